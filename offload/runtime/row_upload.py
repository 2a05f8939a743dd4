"""Small tensors that are made in CPU memory and computed with on the device."""

import math
from collections.abc import Callable, Sequence

import torch

from offload.runtime.page_locked import PageLockedMemory
from offload.storage.devices.base import Device, Event
from offload.storage.host_buffer import HostBuffer
from offload.storage.staging_ring import StagingRing

_BUFFERS = 2


class RowUpload:
    """Looked-up rows on their way to the device, through page-locked memory: nobody waits for the copy."""

    def __init__(self, device: Device, memory: PageLockedMemory) -> None:
        self._device = device
        self._memory = memory
        self._ring = StagingRing(self._locked, device.unlock_pages, limit=_BUFFERS)

    def run(self, shape: Sequence[int], dtype: torch.dtype, fill: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """A tensor of the device with what `fill` writes to one in CPU memory, [rows, width]."""
        if self._device.shares_host_memory:
            rows = torch.empty(shape, dtype=dtype)
            fill(rows)
            return rows
        nbytes = math.prod(shape) * dtype.itemsize
        buffer = self._ring.wait_take(nbytes)
        after = self._ring.after(buffer)
        if after is not None:
            after.synchronize()
        copied: Event | None = None
        try:
            staged = buffer.tensor[:nbytes].view(dtype).view(*shape)
            fill(staged)
            target = torch.empty(shape, dtype=dtype, device=self._device.torch_device)
            copied = self._device.copy_in([(target, staged)], [self._device.record()], "rows")
            self._device.wait(copied)
            return target
        finally:
            self._ring.give(buffer, copied)

    def close(self) -> None:
        self._ring.close()

    def _locked(self, nbytes: int) -> HostBuffer:
        buffer = HostBuffer(nbytes)
        self._memory.lock(buffer, "rows of embeddings")
        return buffer
