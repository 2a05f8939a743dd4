"""Pages of bytes on three tiers: device memory, page-locked CPU memory, disk.

A page is written once, in device memory; it may go down a tier, is brought back into a slot for as long as it is read, and
never written again. Who decides which ones go down is elsewhere; here bytes move, each with its own events, so that
nothing is synchronised but what is waited for.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from offload.storage.blocks import Tier
from offload.storage.devices.base import Device, Event
from offload.storage.errors import BudgetExceeded, OffloadError, ReadError, gib
from offload.storage.host_buffer import HostBuffer
from offload.storage.pages.file import PageFile
from offload.storage.pages.slots import PageSlots
from offload.storage.staging_ring import StagingRing
from offload.storage.transfer import Link, Transfer

STAGING_PAGES = 4
"""Between disk and a device with memory of its own: as many as the disk has threads."""


@dataclass(slots=True, eq=False)
class Page:
    """One page, wherever it is.

    Attributes:
        place: its slot on the device or in CPU memory, or its place in the file.
        references: caches that hold it; the last one frees it.
        users: readers and writers at this moment; a page in use stays where it is.
    """

    pool: "PagePool"
    tier: Tier
    place: int
    references: int = 1
    users: int = 0
    leaving: Transfer | None = None
    """The write to disk that is under way."""
    copied: Event | None = None
    """The copy to CPU memory that may be under way."""
    brought: Event | None = None
    """The last copy to the device, which may be under way, of a page in CPU memory."""
    lost: BaseException | None = None
    """Why it is nowhere: writing it failed."""


class PageFetch:
    """A page of a lower tier on its way into a slot of the device, or there."""

    def __init__(self, pool: "PagePool", page: Page, slot: int) -> None:
        self.page = page
        self.slot = slot
        self._pool = pool
        self.read: Transfer | None = None
        self.copied: Event | None = None

    def wait(self) -> torch.Tensor:
        """Its bytes, uint8 [page_bytes] on the device; valid until `release`. Raises what reading it raised."""
        if self.read is not None:
            self._pool.wait_for(self.read)
        if self.copied is not None:
            self._pool.device.wait(self.copied)
        return self._pool.slots.tensor(self.slot)

    def release(self, after: Event | None = None) -> None:
        """The compute that reads it was submitted: all of it, or what `after` was recorded behind."""
        self._end(after or self._pool.device.record())

    def cancel(self) -> None:
        """It is not wanted any more."""
        if self.read is not None:
            self.read.cancel()
        self._end(self.copied)

    def _end(self, after: Event | None) -> None:
        self.page.users -= 1
        self._pool.slots.give(self.slot, after)


class PagePool:
    """Pages of one size.

    Args:
        page_bytes: a multiple of 4 KiB.
        device_pages: slots in device memory; made as they are needed.
        host_pages: slots in CPU memory beside a device with memory of its own; 0 where the device's memory is the host's.
        open_file: makes the file of the lowest tier when it is first needed.
        reads, writes: the disk's two queues.
        on_wait: told (name of the link, begin, end) of each wait for the disk, by `time.perf_counter()`.
    """

    def __init__(
        self,
        device: Device,
        page_bytes: int,
        device_pages: int,
        host_pages: int,
        open_file: Callable[[int], PageFile],
        reads: Link,
        writes: Link,
        on_wait: Callable[[str, float, float], None] = lambda *wait: None,
    ) -> None:
        self.device = device
        self.page_bytes = page_bytes
        self.slots = PageSlots(device.allocate, page_bytes, device_pages)
        self.host = PageSlots(self._locked_memory, page_bytes, host_pages)
        self._staging = StagingRing(self._locked_memory, device.unlock_pages, STAGING_PAGES)
        self.unlocked_bytes = 0
        """Bytes of CPU memory that could not be page-locked."""
        self.onloaded_bytes = 0
        self.written_bytes = 0
        self._open_file = open_file
        self._file: PageFile | None = None
        self._reads = reads
        self._writes = writes
        self._on_wait = on_wait
        self._leaving: deque[Page] = deque()
        """Pages whose writes to disk may be under way."""
        self._slots_leaving = 0
        """Slots that will be free when these are over."""
        self._counting = threading.Lock()

    @property
    def disk_bytes(self) -> int:
        return 0 if self._file is None else self._file.nbytes

    @property
    def file(self) -> PageFile:
        if self._file is None:
            self._file = self._open_file(self.page_bytes)
        return self._file

    @property
    def has_room(self) -> bool:
        """A slot is free, or will be when a page has left."""
        return bool(self._slots_leaving or self.slots.free)

    def allocate(self) -> Page:
        """A page in device memory, for compute to write; in use.

        Raises:
            BudgetExceeded: if every slot is in use.
        """
        page = Page(self, Tier.DEVICE, self._slot(), users=1)
        after = self.slots.after(page.place)
        if after is not None:
            self.device.wait(after)
        return page

    def tensor(self, page: Page) -> torch.Tensor:
        """uint8 [page_bytes] of a page that is on the device, or in CPU memory beside it."""
        if page.tier is Tier.CPU:
            self._settle(page)
            return self.host.tensor(page.place)
        assert page.tier is Tier.DEVICE, page.tier
        return self.slots.tensor(page.place)

    def share(self, page: Page) -> Page:
        page.references += 1
        return page

    def drop(self, page: Page) -> None:
        """One holder less; the last one frees it."""
        page.references -= 1
        if page.references:
            return
        with suppress(OffloadError):
            # What could not be written is not wanted any more.
            self._settle(page)
        match page.tier:
            case Tier.DEVICE:
                # Compute that reads it may be under way.
                self.slots.give(page.place, self.device.record())
            case Tier.CPU:
                self.host.give(page.place, page.brought)
            case Tier.DISK:
                self.file.give(page.place)

    def demote(self, page: Page, behind: Page | None = None) -> None:
        """Start moving a page down: to CPU memory where there is room, else to disk. It is written once in its life.

        Args:
            behind: one that is read right before it.

        Raises:
            DiskFull: if there is no room; the page stays where it is.
        """
        assert page.tier is Tier.DEVICE and not page.users, "a page in use does not move"
        slot, source = page.place, self.slots.tensor(page.place)
        place = None
        if not self.device.shares_host_memory:
            place = self.host.take_behind(behind.place if behind is not None and behind.tier is Tier.CPU else None)
        if place is not None:
            after = self.host.after(place)
            if after is not None:
                after.synchronize()
            page.copied = self.device.copy_out(self.host.tensor(place), source, "KV page")
            page.tier, page.place = Tier.CPU, place
            self.slots.give(slot, page.copied)
        else:
            place = self.file.take()
            self._write(page, slot, place, source)
            page.tier, page.place = Tier.DISK, place
        self.written_bytes += self.page_bytes

    def fetch(self, pages: Sequence[Page]) -> list[PageFetch]:
        """Start bringing pages of lower tiers into slots; those in CPU memory by one submission.

        Raises:
            BudgetExceeded: if every slot is in use.
        """
        for page in pages:
            if page.tier is not Tier.CPU:
                self._settle(page)
            if page.lost is not None:
                raise ReadError(f"a page of the KV cache could not be written before ({page.lost}), and is lost") from page.lost
        fetches = [PageFetch(self, page, slot) for page, slot in zip(pages, self._slots_for(len(pages)), strict=True)]
        for page in pages:
            page.users += 1
        self.onloaded_bytes += len(pages) * self.page_bytes
        self._copy([fetch for fetch in fetches if fetch.page.tier is Tier.CPU])
        for fetch in fetches:
            if fetch.page.tier is Tier.DISK:
                self._read(fetch, self.slots.tensor(fetch.slot), self.slots.after(fetch.slot))
        return fetches

    def _slots_for(self, count: int) -> list[int]:
        slots = self.slots.take_together(count)
        try:
            while len(slots) < count:
                slots.append(self._slot())
        except BaseException:
            for slot in slots:
                self.slots.give(slot)
            raise
        return slots

    def _copy(self, fetches: Sequence[PageFetch]) -> None:
        """Neighbours on both sides are one copy: what a copy costs beside its bytes is as much as that of a small page."""
        if not fetches:
            return
        after = [event for fetch in fetches for event in (self.slots.after(fetch.slot), fetch.page.copied)]
        runs: list[list[PageFetch]] = []
        for fetch in fetches:
            last = runs[-1][-1] if runs else None
            if (
                last is not None
                and self.slots.follows(fetch.slot, last.slot)
                and self.host.follows(fetch.page.place, last.page.place)
            ):
                runs[-1].append(fetch)
            else:
                runs.append([fetch])
        copied = self.device.copy_in(
            [(self.slots.span(run[0].slot, len(run)), self.host.span(run[0].page.place, len(run))) for run in runs],
            after,
            "KV pages",
        )
        for fetch in fetches:
            fetch.copied = fetch.page.brought = copied

    def wait_for(self, transfer: Transfer) -> None:
        if transfer.over:
            transfer.wait()
            return
        begun = time.perf_counter()
        transfer.wait()
        self._on_wait(transfer.link.name, begun, time.perf_counter())

    def close(self) -> None:
        """Wait for what is under way, and give all memory back."""
        for page in self._leaving:
            if page.leaving is not None:
                page.leaving.cancel()
        for buffer in self.host.close():
            self.device.unlock_pages(buffer)
        self._staging.close()
        self.slots.close()
        if self._file is not None:
            self._file.close()

    def _slot(self) -> int:
        # Read first: a slot that leaves meanwhile is free by then.
        leaving = self._slots_leaving
        slot = self.slots.take()
        if slot is None and not leaving:
            raise BudgetExceeded(
                f"all {self.slots.limit} pages of {gib(self.page_bytes)} that the KV cache has in device memory are in use; "
                "give it more (--kv-memory, kv_memory=)"
            )
        if slot is None:
            begun = time.perf_counter()
            slot = self.slots.wait_take()
            self._on_wait(self._writes.name, begun, time.perf_counter())
        return slot

    def _settle(self, page: Page) -> None:
        """Wait until the page is where it says it is. Raises what writing it raised."""
        if page.copied is not None:
            page.copied.synchronize()
            page.copied = None
        if page.leaving is not None:
            leaving, page.leaving = page.leaving, None
            self._leaving.remove(page)
            try:
                self.wait_for(leaving)
            except BaseException as error:
                page.lost = error
                raise

    def _write(self, page: Page, slot: int, place: int, source: torch.Tensor) -> None:
        file = self.file
        if self.device.shares_host_memory:
            memory = self.slots.memory(slot)
            transfer = self._writes.submit(self.page_bytes, [lambda: file.write(place, memory)], name="KV page")
            with self._counting:
                self._slots_leaving += 1
            transfer.when_over(lambda: self._left(slot))
        else:
            staging = self._staging.wait_take(self.page_bytes)
            after = self._staging.after(staging)
            if after is not None:
                after.synchronize()
            copied = self.device.copy_out(staging.tensor[: self.page_bytes], source, "KV page")
            self.slots.give(slot, copied)

            def write() -> None:
                copied.synchronize()
                file.write(place, staging.memory[: self.page_bytes])

            transfer = self._writes.submit(self.page_bytes, [write], name="KV page")
            transfer.when_over(lambda: self._staging.give(staging))
        page.leaving = transfer
        while self._leaving and self._leaving[0].leaving is not None and self._leaving[0].leaving.over:
            self._settle(self._leaving[0])
        self._leaving.append(page)

    def _left(self, slot: int) -> None:
        self.slots.give(slot)
        with self._counting:
            self._slots_leaving -= 1

    def _read(self, fetch: PageFetch, target: torch.Tensor, after: Event | None) -> None:
        file, place, slot = self.file, fetch.page.place, fetch.slot
        if self.device.shares_host_memory:
            memory = self.slots.memory(slot)
            fetch.read = self._reads.submit(self.page_bytes, [lambda: file.read(place, memory)], name="KV page")
            return
        staging = self._staging.wait_take(self.page_bytes)
        last = self._staging.after(staging)

        def read() -> None:
            if last is not None:
                # The device may still be copying out of it.
                last.synchronize()
            file.read(place, staging.memory[: self.page_bytes])
            fetch.copied = self.device.copy_in([(target, staging.tensor[: self.page_bytes])], [after], "KV page")

        fetch.read = self._reads.submit(self.page_bytes, [read], name="KV page")
        fetch.read.when_over(lambda: self._staging.give(staging, fetch.copied))

    def _locked_memory(self, nbytes: int) -> HostBuffer:
        buffer = HostBuffer(nbytes)
        if not self.device.lock_pages(buffer):
            self.unlocked_bytes += buffer.nbytes
        return buffer
