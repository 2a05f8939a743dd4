"""CPU memory that a device copies from: charged for, and page-locked where that is to be had."""

from collections.abc import Callable

import torch

from offload.runtime.notes import Notes
from offload.storage.arrival import Arrival, CopyArrival
from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES, align_up
from offload.storage.devices.base import Device, Event, copy_bytes_per_second
from offload.storage.errors import gib
from offload.storage.host_buffer import HostBuffer
from offload.storage.ledger import MemoryLedger
from offload.storage.pageable_copies import Copies, PageableCopies
from offload.storage.reader import DiskReader
from offload.storage.staging import StagedReader

STAGING = "staging"
"""What the ledgers call buffers between disk and device."""

_RING_BUFFERS = 3
_RING_PIECE_BYTES = 8 << 20


class PageLockedMemory:
    """The host buffers of one session.

    Args:
        ledger: of CPU memory.
    """

    def __init__(self, device: Device, ledger: MemoryLedger, notes: Notes) -> None:
        self.buffers: list[HostBuffer] = []
        self._locked: list[HostBuffer] = []
        self._pageable: dict[int, HostBuffer] = {}
        """What could not be page-locked, by address."""
        self._ring: PageableCopies | None = None
        self._has_ring = True
        """Or may have one, once it is needed."""
        self.shares_host_memory = device.shares_host_memory
        self._device = device
        self._ledger = ledger
        self._notes = notes

    def allocate(
        self,
        nbytes: int,
        category: str,
        ledger: MemoryLedger | None = None,
        shielded: bool = False,
        prefault: bool = True,
    ) -> HostBuffer:
        """A new buffer, not page-locked yet.

        Args:
            ledger: charged for it; None for that of CPU memory.
            shielded, prefault: as `HostBuffer` has them.
        """
        # Whole pages, as the buffer takes them.
        (ledger or self._ledger).charge(category, align_up(nbytes, BLOCK_ALIGNMENT_BYTES))
        return HostBuffer(nbytes, prefault=prefault, shielded=shielded)

    def keep(self, buffer: HostBuffer, locked: bool = True) -> None:
        """Hold a buffer until `close`, page-locked if it is to be copied from."""
        self.buffers.append(buffer)
        if locked and self._device.lock_pages(buffer):
            self._locked.append(buffer)
        elif locked:
            self._pageable[buffer.address] = buffer

    def forget(self, buffer: HostBuffer) -> None:
        """Let go of a buffer that is kept and not page-locked."""
        self.buffers.remove(buffer)

    def lock(self, buffer: HostBuffer, what: str) -> bool:
        """Page-lock a buffer that somebody else holds, and unlocks; say so where that is refused.

        Args:
            what: passes through it.
        """
        locked = self._device.lock_pages(buffer)
        if not locked and not self._device.shares_host_memory:
            self._notes.warn(f"CPU memory for {what} could not be page-locked: their copies do not overlap with compute")
        return locked

    def start_copy(
        self, buffer: HostBuffer, copies: Copies, after: Event | None, name: str, then: Callable[[], None] | None = None
    ) -> Arrival:
        """Start copying from a buffer that is kept to the device; nothing is written before `after` is passed.

        Args:
            copies: (target, source), contiguous; the sources are parts of `buffer`.
            name: of the block, for the trace.
            then: converts what they brought, on the device.
        """
        if self._has_ring and buffer.address in self._pageable:
            self._ring = self._ring or self._make_ring()
            self._has_ring = self._ring is not None
            if self._ring is not None:
                return self._ring.start(copies, after, name, then)
        copied = self._device.copy_in(copies, [after], name)
        return CopyArrival(self._device, [copied if then is None else self._device.convert(then, copied)])

    def open_staging(self, reader: DiskReader, nbytes: int, count: int) -> StagedReader:
        """A ring of `count` page-locked buffers between disk and device. Whoever asks closes it."""
        buffers = [self.allocate(nbytes, STAGING) for _ in range(count)]
        for buffer in buffers:
            self.keep(buffer)
            if buffer.address in self._pageable and not self._device.shares_host_memory:
                self._notes.warn("CPU memory for staging could not be page-locked: copies to the device are slower")
        return StagedReader(reader, self._device, buffers)

    def copy_bytes_per_second(self, target: torch.Tensor | None) -> float | None:
        """Measure a copy from the largest buffer to copy from to `target` (uint8 on the device); None without either."""
        copied_from = self._locked or list(self._pageable.values())
        buffer = max(copied_from, key=lambda buffer: buffer.nbytes, default=None)
        if buffer is None or target is None:
            return None
        size = min(buffer.nbytes, target.numel())
        return copy_bytes_per_second(self._device, target[:size], buffer.tensor[:size])

    def close(self) -> None:
        """Unlock all buffers, and let go of them. Nothing may be under way."""
        if self._ring is not None:
            self._ring.close()
        for buffer in self._locked:
            self._device.unlock_pages(buffer)
        self._ring = None
        self._locked.clear()
        self._pageable.clear()
        self.buffers.clear()

    def _make_ring(self) -> PageableCopies | None:
        """What could not be page-locked passes through memory that is; None if there is no CPU memory left for it."""
        total = sum(buffer.nbytes for buffer in (*self._locked, *self._pageable.values()))
        refused = sum(buffer.nbytes for buffer in self._pageable.values())
        said = f"{gib(refused)} of the {gib(total)} of CPU memory that is copied from could not be page-locked"
        nbytes = min(_RING_PIECE_BYTES, max(buffer.nbytes for buffer in self._pageable.values()))
        if self._ledger.free_bytes is not None:
            nbytes = min(nbytes, self._ledger.free_bytes // _RING_BUFFERS // BLOCK_ALIGNMENT_BYTES * BLOCK_ALIGNMENT_BYTES)
        if not nbytes:
            self._notes.warn(f"{said}: its copies to the device are slower and do not overlap with compute")
            return None
        buffers = [self.allocate(nbytes, STAGING) for _ in range(_RING_BUFFERS)]
        locked = sum(buffer.nbytes for buffer in buffers if self._lock_instead(buffer))
        self._notes.warn(
            f"{said} (WSL2 allows little): it is copied twice, by way of {gib(nbytes * _RING_BUFFERS)}, of which {gib(locked)} "
            "could be"
        )
        return PageableCopies(self._device, buffers)

    def _lock_instead(self, buffer: HostBuffer) -> bool:
        """Page-lock a buffer; where no more is allowed, at the cost of as much that was locked last."""
        given_back = 0
        while not self._device.lock_pages(buffer):
            if not self._locked or given_back >= buffer.nbytes:
                return False
            given_up = self._locked.pop()
            given_back += given_up.nbytes
            # Copies from it may be under way.
            self._device.synchronize()
            self._device.unlock_pages(given_up)
            self._pageable[given_up.address] = given_up
        # Last to be given up.
        self._locked.insert(0, buffer)
        return True
