"""Gradients on their way from a device to CPU memory, behind backward."""

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from offload.runtime.page_locked import PageLockedMemory
from offload.storage.blocks import align_up
from offload.storage.devices.base import Device, Event
from offload.storage.host_buffer import HostBuffer

_RING_BYTES = 64 << 20
_PIECE_BYTES = 16 << 20


def ring_bytes(gradient_bytes: int) -> int:
    """The page-locked memory that gradients pass through.

    Args:
        gradient_bytes: of all of them.
    """
    return min(_RING_BYTES, align_up(gradient_bytes))


@dataclass(slots=True)
class _Piece:
    begin: int
    end: int
    landed: "Future[None]"


class GradientTransfer:
    """Copies gradients into page-locked memory, and adds them up there in a thread of its own, in the order of their making.

    Nobody waits for a copy but `finish`, and `add` where the ring is full: so no more gradients are held on the device than
    the ring has room for, and the one that is added.

    Args:
        ring_nbytes: of page-locked memory.
    """

    def __init__(self, device: Device, memory: PageLockedMemory, ring_nbytes: int) -> None:
        self._device, self._memory = device, memory
        self._nbytes = ring_nbytes
        self._ring: HostBuffer | None = None
        self._head = 0
        self._under_way: deque[_Piece] = deque()
        self._adder: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def add(self, total: torch.Tensor, gradient: torch.Tensor, filled: bool) -> None:
        """Start adding a gradient of the device.

        Args:
            total: in CPU memory, contiguous, of the gradient's shape.
            filled: there is something to add to; otherwise the gradient becomes the total.
        """
        # In the total's dtype, as a blocking copy would convert it.
        sent, into = gradient.detach().to(total.dtype).contiguous().view(-1), total.detach().view(-1)
        step = min(_PIECE_BYTES, self._nbytes) // total.element_size()
        with self._lock, torch.no_grad():
            for begin in range(0, len(into), step):
                self._send(into[begin : begin + step], sent[begin : begin + step], filled)

    def finish(self) -> None:
        """Wait until every total is complete. Raises what adding raised."""
        with self._lock:
            while self._under_way:
                self._under_way.popleft().landed.result()

    def close(self) -> None:
        """Give the memory and the thread back; nothing is under way afterwards."""
        if self._adder is not None:
            self._adder.shutdown(wait=True)
        self._under_way.clear()
        if self._ring is not None:
            self._device.unlock_pages(self._ring)
        self._adder = self._ring = None

    def _send(self, into: torch.Tensor, sent: torch.Tensor, filled: bool) -> None:
        if self._ring is None or self._adder is None:
            self._ring = HostBuffer(self._nbytes)
            self._memory.lock(self._ring, "gradients")
            self._adder = ThreadPoolExecutor(1, thread_name_prefix="gradients")
        begin = self._head if self._head + into.nbytes <= self._nbytes else 0
        end = begin + into.nbytes
        while any(piece.begin < end and begin < piece.end for piece in self._under_way):
            self._under_way.popleft().landed.result()
        staged = self._ring.tensor[begin:end].view(into.dtype)
        copied = self._device.copy_out(staged, sent, "gradients")
        self._under_way.append(_Piece(begin, end, self._adder.submit(_land, copied, sent, staged, into, filled)))
        self._head = align_up(end)


def _land(copied: Event, sent: torch.Tensor, staged: torch.Tensor, into: torch.Tensor, filled: bool) -> None:
    """Args: sent: held until its copy is over."""
    copied.synchronize()
    with torch.no_grad():
        if filled:
            into.add_(staged)
        else:
            into.copy_(staged)
