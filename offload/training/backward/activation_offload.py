"""What layers were given, while it waits for backward in CPU memory; and what every such store shares.

After SSDTrain (arXiv 2408.10013): what several layers are given is kept once, what is still on its way out is handed back
from there, and what comes next is fetched ahead.
"""

import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES, align_up
from offload.storage.devices.base import Device, Event
from offload.storage.errors import SessionError
from offload.storage.host_buffer import HostBuffer
from offload.storage.staging_ring import StagingRing

_LEAST_BYTES = 1024
"""Smaller ones stay where they are."""

IN_FLIGHT = 4
"""Tensors on their way at once; who keeps one more waits."""


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
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int, weakref.ref[OffloadedTensor]]] = {}

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
        for key in [key for key, (held, _, _) in self._known.items() if held() is None]:
            del self._known[key]
        if id(tensor) in self._known:
            held, version, known = self._known[id(tensor)]
            before = known()
            if held() is tensor and before is not None:
                check_unwritten(tensor, version)
                return before
        kept = self._offload(tensor)
        self._known[id(tensor)] = weakref.ref(tensor), tensor._version, weakref.ref(kept)
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


class Source:
    """The tensor that was put by, as long as somebody else holds it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._held, self._version = weakref.ref(tensor), tensor._version

    def __call__(self) -> torch.Tensor | None:
        """Raises SessionError if somebody has written to it: its copy may be older, or newer."""
        tensor = self._held()
        if tensor is not None:
            check_unwritten(tensor, self._version)
        return tensor


def check_unwritten(tensor: torch.Tensor, version: int) -> None:
    if tensor._version != version:
        raise SessionError(
            "a tensor that a layer was given was written to before backward, which would give wrong gradients; have the model "
            "write to no tensor that a layer was given, or keep what layers are given on the device (activation_tier='gpu')"
        )


def buffer_view(buffer: HostBuffer, like: torch.Tensor) -> torch.Tensor:
    return buffer.tensor[: like.nbytes].view(like.dtype).view(like.shape)


class CpuActivations(ActivationStore):
    """In CPU memory, of a device with memory of its own.

    Args:
        charge: told of bytes that are held, and of those given back (negative).
    """

    def __init__(self, device: Device, charge: Callable[[int], None]) -> None:
        super().__init__(device, charge)
        self._buffers = StagingRing(self._locked_buffer, self._discard)
        self._leaving: deque[tuple[torch.Tensor, int, Event]] = deque()
        """On their way out: their memory must not be used for anything else."""

    def close(self) -> None:
        while self._leaving:
            self._leaving.popleft()[-1].synchronize()
        self._buffers.close()

    def _settle(self) -> None:
        """Wait until one more may be on its way out: each is held until its copy is over."""
        while len(self._leaving) >= IN_FLIGHT:
            self._leaving[0][-1].synchronize()
            tensor, version, _ = self._leaving.popleft()
            check_unwritten(tensor, version)

    def _offload(self, tensor: torch.Tensor) -> "_InHost":
        self._settle()
        buffer = self._buffers.take(tensor.nbytes)
        assert buffer is not None
        event = self._device.copy_out(buffer_view(buffer, tensor), tensor, "layer inputs")
        self._leaving.append((tensor, tensor._version, event))
        return _InHost(self._device, self._buffers, buffer, tensor, event)


class _InHost:
    def __init__(self, device: Device, buffers: StagingRing, buffer: HostBuffer, tensor: torch.Tensor, left: Event) -> None:
        self._device = device
        self._values = buffer_view(buffer, tensor)
        self._source = Source(tensor)
        self._left = left
        self._coming: tuple[torch.Tensor, Event] | None = None
        self._given: Source | None = None
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
        self._given = Source(tensor)
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
