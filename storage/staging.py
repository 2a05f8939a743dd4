"""From disk to a device with memory of its own, by way of a ring of host buffers."""

import queue
import threading
from collections.abc import Sequence

import torch

from offload.storage.devices.base import Device, Event, unversioned
from offload.storage.host_buffer import HostBuffer
from offload.storage.load_plan import LoadPlan
from offload.storage.queued_copy import QueuedCopy
from offload.storage.reader import DiskReader
from offload.storage.staging_ring import StagingRing
from offload.storage.transfer import Transfer


class StagedTransfer(QueuedCopy):
    """A block on its way from disk to the device: read into a staging buffer, then copied from there."""

    def __init__(
        self,
        reader: "StagedReader",
        name: str,
        load_plan: LoadPlan,
        target: torch.Tensor,
        after: Event | None,
    ) -> None:
        super().__init__(reader.device, reader.reader.link.name, name, after)
        self.load_plan = load_plan
        self.target = target


class StagedReader:
    """Feeds blocks from disk to the device in the order in which they were asked for.

    One thread hands out the staging buffers, so that neither the forward pass nor the disk's threads wait for one.

    Args:
        reader: the disk.
        device: where the blocks go.
        buffers: the staging ring; page-locked where that is to be had.
    """

    def __init__(self, reader: DiskReader, device: Device, buffers: Sequence[HostBuffer]) -> None:
        self.reader = reader
        self.device = device
        self._ring = StagingRing.of(buffers)
        self._requested: queue.Queue[StagedTransfer | None] = queue.Queue()
        self._thread = threading.Thread(target=self._feed, name="offload-staging", daemon=True)
        self._thread.start()

    def start(self, name: str, load_plan: LoadPlan, target: torch.Tensor, after: Event | None) -> StagedTransfer:
        """Queue a block; `target` is uint8 [at least `load_plan.device_slot_bytes`] on the device."""
        transfer = StagedTransfer(self, name, load_plan, target, after)
        self._requested.put(transfer)
        return transfer

    def close(self) -> None:
        self._requested.put(None)
        self._thread.join()

    def _feed(self) -> None:
        while (transfer := self._requested.get()) is not None:
            if transfer.cancelled:
                transfer.issued.set()
                continue
            buffer = self._ring.wait_take(transfer.load_plan.stored.slot_bytes)
            last_copy = self._ring.after(buffer)
            if last_copy is not None:
                # The device may still be copying out of this buffer.
                last_copy.synchronize()
            self._read(transfer, buffer)

    def _read(self, transfer: StagedTransfer, buffer: HostBuffer) -> None:
        load_plan, stored = transfer.load_plan, transfer.load_plan.stored
        emptied: list[Event] = []

        def copy() -> None:
            if transfer.cancelled:
                return
            target = load_plan.stored_part(transfer.target)
            copied = self.device.copy_in([(target, buffer.tensor[: len(target)])], [transfer.after], transfer.name)
            emptied.append(copied)
            transfer.copied = copied
            if load_plan.steps:
                transfer.copied = self.device.convert(lambda: load_plan.decode(unversioned(transfer.target)), copied)

        read = self.reader.read(stored, buffer.memory[: stored.slot_bytes], copy, transfer.name)
        read.when_over(lambda: self._read_over(transfer, buffer, read, emptied))

    def _read_over(self, transfer: StagedTransfer, buffer: HostBuffer, read: Transfer, emptied: Sequence[Event]) -> None:
        transfer.error = read.error
        self._ring.give(buffer, next(iter(emptied), None))
        transfer.issued.set()
