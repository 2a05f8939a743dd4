"""Memory for layers that are put together, used again for the next one.

Fresh memory of this size comes from the system each time, and touching it for the first time takes longer than filling it: on a
CPU, seven times as long. A device's own allocator keeps what was freed.
"""

import torch

_ROOM = 16
"""The part by which a buffer is larger than what was asked for: a context grows."""

_UNSHARED = 2
"""References to a storage that only its buffer holds: that one, and the one that is made to ask."""


class BufferCache:
    """Tensors in buffers that nobody holds any more."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A contiguous tensor; as long as it is held, or a view of it, its memory is nobody else's."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        buffer = next((item for item in self._buffers if item.numel() >= nbytes and _is_free(item)), None)
        if buffer is None:
            self._buffers = [item for item in self._buffers if not _is_free(item)]
            with torch.inference_mode(False):
                buffer = torch.empty(nbytes + nbytes // _ROOM, dtype=torch.uint8)
            self._buffers.append(buffer)
        return buffer[:nbytes].view(dtype).view(shape)

    def forget(self) -> None:
        self._buffers = []


def _is_free(buffer: torch.Tensor) -> bool:
    return int(torch._C._storage_Use_Count(buffer.untyped_storage()._cdata)) <= _UNSHARED
