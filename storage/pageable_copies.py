"""From CPU memory that is not page-locked to a device, by way of a small ring that is."""

import queue
import threading
from collections.abc import Callable, Sequence

import torch

from offload.storage.devices.base import Device, Event
from offload.storage.host_buffer import HostBuffer
from offload.storage.queued_copy import QueuedCopy
from offload.storage.staging_ring import StagingRing

Copies = Sequence[tuple[torch.Tensor, torch.Tensor]]


class PageableCopies:
    """Copies piece by piece, in the order of asking, in a thread of its own.

    A driver copies from ordinary memory while whoever asked stands still, behind all that is queued before.

    Args:
        buffers: the ring, all of one size.
    """

    def __init__(self, device: Device, buffers: Sequence[HostBuffer]) -> None:
        self._device = device
        self._piece_bytes = buffers[0].nbytes
        self._ring = StagingRing.of(buffers)
        self._requested: queue.Queue[tuple[QueuedCopy, Copies, Callable[[], None] | None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._feed, name="offload-pageable", daemon=True)
        self._thread.start()

    def start(self, copies: Copies, after: Event | None, name: str, then: Callable[[], None] | None = None) -> QueuedCopy:
        """Queue copies of contiguous tensors: (target on the device, source in CPU memory), of one dtype and shape.

        Args:
            then: converts what they brought, on the device.
        """
        copy = QueuedCopy(self._device, self._device.copy_link, name, after)
        self._requested.put((copy, copies, then))
        return copy

    def close(self) -> None:
        self._requested.put(None)
        self._thread.join()

    def _feed(self) -> None:
        while (request := self._requested.get()) is not None:
            copy, copies, then = request
            try:
                self._bring(copy, copies)
                if then is not None and not copy.cancelled and copy.copied is not None:
                    copy.copied = self._device.convert(then, copy.copied)
            except BaseException as error:  # handed to the waiter, whatever it is
                copy.error = error
            copy.issued.set()

    def _bring(self, copy: QueuedCopy, copies: Copies) -> None:
        for target, source in copies:
            onto, of = target.view(-1), source.view(-1)
            step = self._piece_bytes // source.element_size()
            for begin in range(0, len(of), step):
                if copy.cancelled:
                    return
                copy.copied = self._piece(onto[begin : begin + step], of[begin : begin + step], copy)

    def _piece(self, target: torch.Tensor, source: torch.Tensor, copy: QueuedCopy) -> Event:
        buffer = self._ring.wait_take(source.nbytes)
        last = self._ring.after(buffer)
        if last is not None:
            # The device may still be copying out of it.
            last.synchronize()
        staged = buffer.tensor[: source.nbytes].view(source.dtype)
        staged.copy_(source)
        copied = self._device.copy_in([(target, staged)], [copy.after], copy.name)
        self._ring.give(buffer, copied)
        return copied
