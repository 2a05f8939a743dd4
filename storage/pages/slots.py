"""Places for pages in the memory of one tier."""

import threading
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from offload.storage.devices.base import Event

_CHUNK_BYTES = 32 << 20
_RUN_SLOTS = 8
"""Neighbours that are kept together where a page is to lie behind another one: they are copied in one."""


class Buffer(Protocol):
    """Memory as bytes; on the host, also as a memoryview."""

    tensor: torch.Tensor


class PageSlots:
    """Slots of one size with a free list on the host; their memory is taken in chunks, when it is first needed.

    Args:
        allocate: memory of so many bytes.
        page_bytes: of one slot.
        limit: the most slots there may be.
    """

    def __init__(self, allocate: Callable[[int], Buffer], page_bytes: int, limit: int) -> None:
        self.page_bytes = page_bytes
        self.limit = limit
        self._allocate = allocate
        self._chunk_pages = max(1, _CHUNK_BYTES // page_bytes)
        self._buffers: list[Buffer] = []
        self._made = 0
        self._free: list[int] = []
        """In their order."""
        self._after: dict[int, Event] = {}
        self._given = threading.Condition()

    @property
    def free(self) -> int:
        """Slots that can be taken now."""
        with self._given:
            return len(self._free) + self.limit - self._made

    @property
    def held_bytes(self) -> int:
        """Memory that was taken so far."""
        return self._made * self.page_bytes

    def take(self) -> int | None:
        """The first free slot; None if all are in use."""
        with self._given:
            if not self._free:
                self._make()
            return self._free.pop(0) if self._free else None

    def take_behind(self, slot: int | None) -> int | None:
        """The slot behind `slot` if it is free; else one that others may follow, or any. None if all are in use.

        Args:
            slot: None to begin a run.
        """
        with self._given:
            if slot is not None:
                place = bisect_left(self._free, slot + 1)
                if self._free[place : place + 1] == [slot + 1]:
                    return self._free.pop(place)
            first = self._run()
            if first is None and self._made < self.limit:
                self._make()
                first = self._run()
            return self._free.pop(first or 0) if self._free else None

    def _run(self) -> int | None:
        """Where in the list of free slots a run begins that nobody else is in."""
        return self._neighbours((place for place, slot in enumerate(self._free) if not slot % _RUN_SLOTS), _RUN_SLOTS)

    def take_together(self, count: int) -> list[int]:
        """As many slots, neighbours if there are such, the last ones; fewer where fewer are free."""
        with self._given:
            if len(self._free) < count:
                self._make()
            last = max(0, len(self._free) - count)
            first = self._neighbours(range(last, -1, -1), count)
            begin = last if first is None else first
            taken = self._free[begin : begin + count]
            del self._free[begin : begin + count]
            return taken

    def _neighbours(self, places: Iterable[int], count: int) -> int | None:
        """The first of these places in the list of free slots where so many neighbours begin."""
        free = self._free
        return next(
            (place for place in places if place + count <= len(free) and free[place + count - 1] - free[place] == count - 1),
            None,
        )

    def _make(self) -> None:
        count = min(self._chunk_pages, self.limit - self._made)
        if count > 0:
            self._buffers.append(self._allocate(count * self.page_bytes))
            self._free.extend(range(self._made, self._made + count))
            self._made += count

    def wait_take(self) -> int:
        """A slot, as soon as another thread gives one back."""
        while (slot := self.take()) is None:
            with self._given:
                self._given.wait_for(lambda: bool(self._free), timeout=1.0)
        return slot

    def give(self, slot: int, after: Event | None = None) -> None:
        """Args: after: must be passed before anything is written there."""
        with self._given:
            if after is not None:
                self._after[slot] = after
            insort(self._free, slot)
            self._given.notify()

    def after(self, slot: int) -> Event | None:
        """What must be passed before anything is written to a slot that was taken; asked once."""
        with self._given:
            return self._after.pop(slot, None)

    def tensor(self, slot: int) -> torch.Tensor:
        """uint8 [page_bytes]."""
        return self.span(slot, 1)

    def follows(self, slot: int, before: int) -> bool:
        """True if `slot` lies right behind `before`, in the same memory."""
        return slot == before + 1 and bool(slot % self._chunk_pages)

    def span(self, slot: int, count: int) -> torch.Tensor:
        """uint8 [count * page_bytes] of slots of which each follows the one before."""
        start = slot % self._chunk_pages * self.page_bytes
        return self._buffers[slot // self._chunk_pages].tensor[start : start + count * self.page_bytes]

    def memory(self, slot: int) -> memoryview:
        """The same for the disk; on the host only."""
        start = slot % self._chunk_pages * self.page_bytes
        memory: memoryview = self._buffers[slot // self._chunk_pages].memory  # type: ignore[attr-defined]
        return memory[start : start + self.page_bytes]

    def close(self) -> list[Buffer]:
        """Forget the memory; what it was."""
        buffers, self._buffers = self._buffers, []
        self._made = self.limit = 0
        self._free.clear()
        self._after.clear()
        return buffers
