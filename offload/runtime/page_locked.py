"""CPU memory that a device copies from: charged for, and page-locked where that is to be had."""

import torch

from offload.runtime.notes import Notes
from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES, align_up
from offload.storage.devices.base import Device, copy_bytes_per_second
from offload.storage.host_buffer import HostBuffer
from offload.storage.ledger import MemoryLedger
from offload.storage.reader import DiskReader
from offload.storage.staging import StagedReader

STAGING = "staging"
"""What the ledgers call buffers between disk and device."""


class PageLockedMemory:
    """The host buffers of one session.

    Args:
        ledger: of CPU memory.
    """

    def __init__(self, device: Device, ledger: MemoryLedger, notes: Notes) -> None:
        self.buffers: list[HostBuffer] = []
        self._copied_from: list[HostBuffer] = []
        self._device = device
        self._ledger = ledger
        self._notes = notes

    def allocate(self, nbytes: int, category: str, ledger: MemoryLedger | None = None) -> HostBuffer:
        """A new buffer, not page-locked yet.

        Args:
            ledger: charged for it; None for that of CPU memory.
        """
        # Whole pages, as the buffer takes them.
        (ledger or self._ledger).charge(category, align_up(nbytes, BLOCK_ALIGNMENT_BYTES))
        return HostBuffer(nbytes)

    def keep(self, buffer: HostBuffer, locked: bool = True) -> None:
        """Hold a buffer until `close`, page-locked if it is to be copied from."""
        self.buffers.append(buffer)
        if not locked:
            return
        self._copied_from.append(buffer)
        if not self._device.lock_pages(buffer):
            self._notes.warn(
                "CPU memory could not be page-locked: copies to the device are slower and do not overlap with compute"
            )

    def open_staging(self, reader: DiskReader, nbytes: int, count: int) -> StagedReader:
        """A ring of `count` page-locked buffers between disk and device. Whoever asks closes it."""
        buffers = [self.allocate(nbytes, STAGING) for _ in range(count)]
        for buffer in buffers:
            self.keep(buffer)
        return StagedReader(reader, self._device, buffers)

    def copy_bytes_per_second(self, target: torch.Tensor | None) -> float | None:
        """Measure a copy from the largest buffer to copy from to `target` (uint8 on the device); None without either."""
        buffer = max(self._copied_from, key=lambda buffer: buffer.nbytes, default=None)
        if buffer is None or target is None:
            return None
        size = min(buffer.nbytes, target.numel())
        return copy_bytes_per_second(self._device, target[:size], buffer.tensor[:size])

    def close(self) -> None:
        """Unlock all buffers, and let go of them."""
        for buffer in self._copied_from:
            self._device.unlock_pages(buffer)
        self._copied_from.clear()
        self.buffers.clear()
