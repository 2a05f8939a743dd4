"""Host memory for weights: aligned, prefaulted, given back exactly."""

import ctypes
import mmap
import os

import torch

from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES, align_up

_MADV_POPULATE_WRITE = 23  # Linux 5.14; absent from Python's mmap module
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_LARGE_BYTES = 1 << 20


class HostBuffer:
    """Memory of an exact size, starting on a page: anonymous and private, or with a second mapping that others write to.

    Not `torch.empty`: O_DIRECT wants page-aligned addresses, which torch does not give, and page-locking through
    `pin_memory` rounds sizes up to a power of two.

    Args:
        nbytes: size; rounded up to whole pages.
        prefault: touch every page now, so that no page fault falls into a timed copy.
        shielded: what is written to its `own_storage` stays there, in pages of its own, and never reaches the buffer: so that
            the kernel can tell that it was written to, by whatever view (`storage.written_pages`).
    """

    def __init__(self, nbytes: int, *, prefault: bool = True, shielded: bool = False) -> None:
        self.nbytes = align_up(max(nbytes, 1), BLOCK_ALIGNMENT_BYTES)
        self.shielded = shielded
        if shielded:
            self._map, self._lent = _twice_mapped(self.nbytes)
        else:
            self._map = self._lent = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _advise(self._map, getattr(mmap, "MADV_HUGEPAGE", None))
        if prefault:
            _advise(self._map, _MADV_POPULATE_WRITE)
        self.memory = memoryview(self._map)
        with torch.inference_mode(False):
            self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self.address = self.tensor.data_ptr()
        self._lent_address = _over(self._lent, 0, self.nbytes).data_ptr()

    @property
    def resident_bytes(self) -> int:
        """Bytes of it that are in RAM: pages are made when they are first written to."""
        in_core = torch.zeros(self.nbytes // mmap.PAGESIZE, dtype=torch.uint8)
        arguments = ctypes.c_void_p(self.address), ctypes.c_size_t(self.nbytes), ctypes.c_void_p(in_core.data_ptr())
        return 0 if ctypes.CDLL(None).mincore(*arguments) else int((in_core & 1).sum()) * mmap.PAGESIZE

    def own_storage(self, offset: int, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] over this memory whose storage is just those bytes, so that saving it writes no more."""
        return _over(self._lent, offset, nbytes)

    def behind(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The buffer's own bytes behind a tensor in shielded memory, in the same shape; None for a tensor elsewhere."""
        offset = tensor.data_ptr() - self._lent_address
        if not self.shielded or not 0 <= offset < self.nbytes:
            return None
        return _over(self._map, offset, tensor.nbytes).view(tensor.dtype).view(tensor.shape)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's bytes are the buffer's, so that what is written to them is copied from here."""
        return self.address <= tensor.data_ptr() < self.address + self.nbytes


def _over(memory: mmap.mmap, offset: int, nbytes: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.frombuffer(memoryview(memory)[offset : offset + nbytes], dtype=torch.uint8)


def _twice_mapped(nbytes: int) -> tuple[mmap.mmap, mmap.mmap]:
    """The same memory as it is, and as others see it until they write to it."""
    descriptor = os.memfd_create("offload", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, nbytes)
        return mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED), mmap.mmap(descriptor, nbytes, flags=mmap.MAP_PRIVATE)
    finally:
        os.close(descriptor)


def release_freed_memory() -> None:
    """Give back to the system what was freed and malloc still keeps.

    Large aligned tensors that come and go fragment its heap: a hole is some bytes too small for the next one of the same
    size, and the process grows by a tensor each time.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc only
        trim(0)


def keep_large_tensors_apart() -> None:
    """Let malloc map each large tensor by itself for the rest of the process, so that its memory goes when it is freed.

    In its heap, tensors of a layer that come and go leave holes of 10 MiB and more, another number each time. A long prompt
    takes up to a third longer so: its pages are made anew.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def _advise(memory: mmap.mmap, advice: int | None) -> None:
    """Advice is an optimisation: an old kernel that does not know it changes nothing but speed."""
    if advice is not None:
        try:
            memory.madvise(advice)
        except OSError:
            pass
