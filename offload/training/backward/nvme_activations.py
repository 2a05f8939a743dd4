"""What layers were given, while it waits for backward on NVMe."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES, align_up
from offload.storage.devices.base import Device, Event
from offload.storage.host_buffer import HostBuffer
from offload.storage.staging_ring import StagingRing
from offload.storage.state_file import StateFile
from offload.storage.transfer import Link, Transfer
from offload.training.backward.activation_offload import IN_FLIGHT, ActivationStore, Source, buffer_view, check_unwritten

INPUT_BUFFERS = 2 * IN_FLIGHT
"""In CPU memory, between the device and NVMe: on their way out, and back."""


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
        self._coming: deque[Transfer] = deque()
        self._forgotten: deque[_Forgotten] = deque()
        self._lock = threading.Lock()

    def close(self) -> None:
        for under_way in (*self._leaving, *self._coming):
            under_way.cancel()
        self._leaving.clear()
        self._coming.clear()
        self._buffers.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def forget(self, left: "_Forgotten") -> None:
        """Nobody wants a tensor any more. Waits for nothing: who forgets it may hold any lock."""
        self._forgotten.append(left)

    def start_reading(self, place: int, nbytes: int, wait: bool) -> tuple[HostBuffer, Transfer] | None:
        """Begin to read back; None if all buffers are in use, unless somebody waits."""
        self._take_back()
        buffer = self._buffers.take(nbytes)
        if buffer is None and not wait:
            return None
        # All are in use for what was fetched ahead: one for this one alone.
        buffer = buffer or HostBuffer(nbytes)
        file, target = self._opened(), buffer.memory[:nbytes]
        transfer = self._reads.submit(nbytes, [lambda: file.read(place, target)], name="layer inputs")
        while self._coming and self._coming[0].over:
            self._coming.popleft()
        self._coming.append(transfer)
        return buffer, transfer

    def give(self, buffer: HostBuffer) -> None:
        """Let others use a buffer."""
        self._buffers.give(buffer)

    def _offload(self, tensor: torch.Tensor) -> "_OnDisk":
        self._take_back()
        buffer = self._buffer_for(tensor.nbytes)
        event = self._device.copy_out(buffer_view(buffer, tensor), tensor, "layer inputs")
        nbytes = align_up(tensor.nbytes, BLOCK_ALIGNMENT_BYTES)
        place = self._allocate(nbytes)
        file = self._opened()
        # Its memory must not be used for anything else before it is copied.
        leaving, version = [tensor], tensor._version

        def write() -> None:
            event.synchronize()
            check_unwritten(leaving.pop(), version)
            file.write(place, buffer.memory[:nbytes])

        written = self._writes.submit(nbytes, [write], name="layer inputs")
        self._leaving.append(written)
        kept = _OnDisk(self, tensor, buffer, event, place, written)
        written.when_over(kept.forget_buffer())
        return kept

    def _buffer_for(self, nbytes: int) -> HostBuffer:
        while len(self._leaving) >= IN_FLIGHT:
            self._leaving.popleft().wait()
        while (buffer := self._buffers.take(nbytes)) is None and self._leaving:
            self._leaving.popleft().wait()
        return buffer or HostBuffer(nbytes)

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

    def _take_back(self) -> None:
        """Use again what tensors had that nobody wants any more: not while their bytes are still moving there."""
        with self._lock:
            for _ in range(len(self._forgotten)):
                left = self._forgotten.popleft()
                if left.moves:
                    self._forgotten.append(left)
                    continue
                self._free.setdefault(left.nbytes, []).append(left.place)
                if left.coming is not None:
                    self._buffers.give(left.coming[0])


@dataclass(frozen=True, slots=True)
class _Forgotten:
    """What a tensor had of the file and of the buffers."""

    place: int
    nbytes: int
    written: Transfer
    coming: tuple[HostBuffer, Transfer] | None

    @property
    def moves(self) -> bool:
        return not self.written.over or (self.coming is not None and not self.coming[1].over)


class _OnDisk:
    def __init__(
        self, store: NvmeActivations, tensor: torch.Tensor, buffer: HostBuffer, left: Event, place: int, written: Transfer
    ) -> None:
        self._store = store
        self._left = left
        self._like = torch.empty_like(tensor, device="meta")
        self._source = Source(tensor)
        self._given: Source | None = None
        self._outgoing: list[HostBuffer] = [buffer]
        self._place, self._nbytes = place, written.nbytes
        self._written = written
        self._lock = threading.Lock()
        self._coming: tuple[HostBuffer, Transfer] | None = None

    def forget_buffer(self) -> Callable[[], None]:
        """What is to be done when it is written. Holds no reference to what is kept."""
        outgoing, lock, store = self._outgoing, self._lock, self._store

        def forget() -> None:
            with lock:
                store.give(outgoing.pop())

        return forget

    def prefetch(self) -> None:
        if self._coming is None and self._source() is None and self._written.over:
            self._coming = self._store.start_reading(self._place, self._nbytes, wait=False)

    def tensor(self) -> torch.Tensor:
        given = self._source() if self._given is None else self._given()
        if given is not None:
            return given
        tensor = self._on_its_way_out()
        if tensor is None:
            tensor = self._read()
        self._given = Source(tensor)
        return tensor

    def _on_its_way_out(self) -> torch.Tensor | None:
        with self._lock:
            if not self._outgoing:
                return None
            self._left.synchronize()
            return self._copied(self._outgoing[0])

    def _read(self) -> torch.Tensor:
        self._written.wait()
        coming = self._coming or self._store.start_reading(self._place, self._nbytes, wait=True)
        assert coming is not None
        self._coming = None
        buffer, transfer = coming
        try:
            transfer.wait()
            return self._copied(buffer)
        finally:
            self._store.give(buffer)

    def _copied(self, buffer: HostBuffer) -> torch.Tensor:
        target = torch.empty_like(self._like, device=self._store._device.torch_device)
        self._store._device.copy_in([(target, buffer_view(buffer, self._like))], [self._store._device.record()]).synchronize()
        return target

    def __del__(self) -> None:
        self._store.forget(_Forgotten(self._place, self._nbytes, self._written, self._coming))
