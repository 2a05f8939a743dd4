"""What layers were given, while it waits for backward: in CPU memory or on NVMe.

After SSDTrain (arXiv 2408.10013): what several layers are given is kept once, what is still on its way out is handed back
from there, and what comes next is fetched ahead.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES, align_up
from offload.storage.devices.base import Device, Event
from offload.storage.host_buffer import HostBuffer
from offload.storage.staging_ring import StagingRing
from offload.storage.state_file import StateFile
from offload.storage.transfer import Link, Transfer

_LEAST_BYTES = 1024
"""Smaller ones stay where they are."""

_IN_FLIGHT = 4
"""Tensors on their way at once; who keeps one more waits."""

INPUT_BUFFERS = 2 * _IN_FLIGHT
"""In CPU memory, between the device and NVMe: on their way out, and back."""


class OffloadedTensor(Protocol):
    """A tensor that was put by."""

    def prefetch(self) -> None:
        """It is wanted soon."""

    def tensor(self) -> torch.Tensor:
        """Its values, on the device."""


class ActivationStore:
    """Offloads tensors; one that it was given before is not offloaded again.

    Args:
        charge: called with bytes of CPU memory that are held, and with those given back (negative).
    """

    _buffers: StagingRing

    def __init__(self, device: Device, charge: Callable[[int], None]) -> None:
        self.pageable = False
        """Its memory could not be page-locked."""
        self._device = device
        self._charge = charge
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], weakref.ref[OffloadedTensor]]] = {}

    def takes(self, value: object) -> bool:
        """Large plain tensors on the device."""
        return (
            type(value) is torch.Tensor
            and value.is_floating_point()
            and value.nbytes >= _LEAST_BYTES
            and value.is_contiguous()
            and value.device.type == self._device.torch_device.type
        )

    def keep(self, tensor: torch.Tensor) -> OffloadedTensor:
        """Its values as they are now."""
        for key in [key for key, (held, _) in self._known.items() if held() is None]:
            del self._known[key]
        if id(tensor) in self._known:
            held, known = self._known[id(tensor)]
            before = known()
            if held() is tensor and before is not None:
                return before
        kept = self._offload(tensor)
        self._known[id(tensor)] = weakref.ref(tensor), weakref.ref(kept)
        return kept

    def close(self) -> None:
        """Give memory and files back."""

    def _offload(self, tensor: torch.Tensor) -> OffloadedTensor:
        raise NotImplementedError

    def _locked_buffer(self, nbytes: int) -> HostBuffer:
        self._charge(align_up(nbytes, BLOCK_ALIGNMENT_BYTES))
        buffer = HostBuffer(nbytes)
        self.pageable = not self._device.lock_pages(buffer) and not self._device.shares_host_memory
        return buffer

    def _discard(self, buffer: HostBuffer) -> None:
        self._device.unlock_pages(buffer)
        self._charge(-buffer.nbytes)


def _as(buffer: HostBuffer, like: torch.Tensor) -> torch.Tensor:
    return buffer.tensor[: like.nbytes].view(like.dtype).view(like.shape)


class CpuActivations(ActivationStore):
    """In CPU memory, of a device with memory of its own.

    Args:
        charge: told of bytes that are held, and of those given back (negative).
    """

    def __init__(self, device: Device, charge: Callable[[int], None]) -> None:
        super().__init__(device, charge)
        self._buffers = StagingRing(self._locked_buffer, self._discard)
        self._leaving: deque[tuple[torch.Tensor, Event]] = deque()
        """On their way out: their memory must not be used for anything else."""

    def close(self) -> None:
        self._settle(0)
        self._buffers.close()

    def _settle(self, count: int) -> None:
        """Wait until no more than `count` are on their way out: each is held until its copy is over."""
        while len(self._leaving) > count:
            self._leaving[0][1].synchronize()
            self._leaving.popleft()

    def _offload(self, tensor: torch.Tensor) -> "_InHost":
        self._settle(_IN_FLIGHT - 1)
        buffer = self._buffers.take(tensor.nbytes)
        assert buffer is not None
        event = self._device.copy_out(_as(buffer, tensor), tensor, "layer inputs")
        self._leaving.append((tensor, event))
        return _InHost(self._device, self._buffers, buffer, tensor, event)


class _InHost:
    def __init__(self, device: Device, buffers: StagingRing, buffer: HostBuffer, tensor: torch.Tensor, left: Event) -> None:
        self._device = device
        self._values = _as(buffer, tensor)
        self._source = weakref.ref(tensor)
        self._left = left
        self._coming: tuple[torch.Tensor, Event] | None = None
        self._given: weakref.ref[torch.Tensor] | None = None
        self._last_use: list[Event] = [left]
        weakref.finalize(self, _release, buffers, buffer, self._last_use)

    def prefetch(self) -> None:
        if self._coming is None and self._source() is None:
            self._coming = self._start()

    def tensor(self) -> torch.Tensor:
        given = self._source() if self._given is None else self._given()
        if given is not None:
            return given
        tensor, event = self._coming or self._start()
        self._coming = None
        self._device.wait(event)
        self._given = weakref.ref(tensor)
        return tensor

    def _start(self) -> tuple[torch.Tensor, Event]:
        self._left.synchronize()
        target = torch.empty_like(self._values, device=self._device.torch_device)
        event = self._device.copy_in([(target, self._values)], [self._device.record()], "layer inputs")
        self._last_use[0] = event
        return target, event


def _release(buffers: StagingRing, buffer: HostBuffer, last_use: list[Event]) -> None:
    # A copy from it may still be under way on the device.
    last_use[0].synchronize()
    buffers.give(buffer)


class NvmeActivations(ActivationStore):
    """On NVMe, through a few buffers.

    Args:
        folder: of the file, which is made when it is needed, and has no name.
        reads, writes: the links whose threads move the bytes.
        charge: told of bytes of CPU memory that are held, and of those given back (negative).
    """

    def __init__(self, device: Device, folder: str, reads: Link, writes: Link, charge: Callable[[int], None]) -> None:
        super().__init__(device, charge)
        self._folder = folder
        self._reads, self._writes = reads, writes
        self._buffers = StagingRing(self._locked_buffer, self._discard, INPUT_BUFFERS)
        self._file: StateFile | None = None
        self._end = 0
        self._free: dict[int, list[int]] = {}
        self._leaving: deque[Transfer] = deque()
        self._lock = threading.Lock()

    def close(self) -> None:
        while self._leaving:
            self._leaving.popleft().cancel()
        self._buffers.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _offload(self, tensor: torch.Tensor) -> "_OnDisk":
        while len(self._leaving) >= _IN_FLIGHT or (buffer := self._buffers.take(tensor.nbytes)) is None:
            self._leaving.popleft().wait()
        event = self._device.copy_out(_as(buffer, tensor), tensor, "layer inputs")
        nbytes = align_up(tensor.nbytes, BLOCK_ALIGNMENT_BYTES)
        place = self._allocate(nbytes)
        kept = _OnDisk(self, tensor, buffer, event, place, nbytes)
        weakref.finalize(kept, self._give_up, place, nbytes)
        file = self._opened()
        # Its memory must not be used for anything else before it is copied.
        leaving = [tensor]

        def write() -> None:
            event.synchronize()
            leaving.clear()
            file.write(place, buffer.memory[:nbytes])

        kept.written = self._writes.submit(nbytes, [write], name="layer inputs")
        self._leaving.append(kept.written)
        kept.written.when_over(kept.forget_buffer())
        return kept

    def _opened(self) -> StateFile:
        if self._file is None:
            self._file = StateFile.new(self._folder)
        self._file.reserve(self._end)
        return self._file

    def _allocate(self, nbytes: int) -> int:
        with self._lock:
            if self._free.get(nbytes):
                return self._free[nbytes].pop()
            place, self._end = self._end, self._end + nbytes
            return place

    def _give_up(self, place: int, nbytes: int) -> None:
        with self._lock:
            self._free.setdefault(nbytes, []).append(place)


class _OnDisk:
    written: Transfer

    def __init__(
        self, store: NvmeActivations, tensor: torch.Tensor, buffer: HostBuffer, left: Event, place: int, nbytes: int
    ) -> None:
        self._store = store
        self._left = left
        self._like = torch.empty_like(tensor, device="meta")
        self._source = weakref.ref(tensor)
        self._given: weakref.ref[torch.Tensor] | None = None
        self._outgoing: list[HostBuffer] = [buffer]
        self._place, self._nbytes = place, nbytes
        self._lock = threading.Lock()
        self._coming: tuple[HostBuffer, Transfer] | None = None

    def forget_buffer(self) -> Callable[[], None]:
        """What is to be done when it is written. Holds no reference to what is kept."""
        outgoing, lock, buffers = self._outgoing, self._lock, self._store._buffers

        def forget() -> None:
            with lock:
                buffers.give(outgoing.pop())

        return forget

    def prefetch(self) -> None:
        if self._coming is None and self._source() is None and self.written.over:
            self._coming = self._start(wait=False)

    def tensor(self) -> torch.Tensor:
        given = self._source() if self._given is None else self._given()
        if given is not None:
            return given
        tensor = self._on_its_way_out()
        if tensor is None:
            tensor = self._read()
        self._given = weakref.ref(tensor)
        return tensor

    def _on_its_way_out(self) -> torch.Tensor | None:
        with self._lock:
            if not self._outgoing:
                return None
            self._left.synchronize()
            return self._copied(self._outgoing[0])

    def _read(self) -> torch.Tensor:
        self.written.wait()
        coming = self._coming or self._start(wait=True)
        assert coming is not None
        self._coming = None
        buffer, transfer = coming
        try:
            transfer.wait()
            return self._copied(buffer)
        finally:
            self._store._buffers.give(buffer)

    def _start(self, wait: bool) -> tuple[HostBuffer, Transfer] | None:
        store = self._store
        buffer = store._buffers.take(self._nbytes)
        if buffer is None and wait:
            # All are in use for what was fetched ahead: one for this one alone.
            buffer = HostBuffer(self._nbytes)
        if buffer is None:
            return None
        file = store._opened()
        target = buffer.memory[: self._nbytes]
        return buffer, store._reads.submit(self._nbytes, [lambda: file.read(self._place, target)], name="layer inputs")

    def _copied(self, buffer: HostBuffer) -> torch.Tensor:
        target = torch.empty_like(self._like, device=self._store._device.torch_device)
        self._store._device.copy_in([(target, _as(buffer, self._like))], [self._store._device.record()]).synchronize()
        return target

    def __del__(self) -> None:
        if self._coming is not None:
            buffer, transfer = self._coming
            transfer.cancel()
            self._store._buffers.give(buffer)
