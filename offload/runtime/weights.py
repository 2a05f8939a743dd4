"""Blocks as the executor handles them: those that stay on the device, those that pass through the slots, and tables
of which single rows are fetched."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from offload.model.homes import ParameterHome
from offload.storage.blocks import BlockKey, FileRange, align_up
from offload.storage.devices.base import Device, DeviceBuffer, Event
from offload.storage.host_buffer import HostBuffer
from offload.storage.read_plan import ReadPlan
from offload.storage.reader import DiskReader
from offload.storage.staging import StagedReader, StagedTransfer
from offload.storage.transfer import Transfer

Waits = dict[str, float]
"""Seconds that compute stood still, by the name of the link that it waited for."""


class Arrival(Protocol):
    """A block on its way into a slot."""

    def wait(self) -> Waits:
        """Return when compute may use the block: at once, where the device itself waits for the copy."""

    def cancel(self) -> None:
        """Return when nothing writes into the slot any more."""


@dataclass(frozen=True, slots=True)
class SlotRegion:
    """The bytes of some neighbouring slots.

    Attributes:
        tensor: uint8 on the device.
        memory: the same bytes, where the device's memory is the host's.
    """

    tensor: torch.Tensor
    memory: memoryview | None


class BlockSource(Protocol):
    """How the bytes of one block get into a slot.

    Attributes:
        offsets: where each tensor of the block lies in the slot afterwards.
        payload_bytes: bytes of the tensors, the figure that the link counts.
        slot_bytes: what the block takes in the slots.
    """

    offsets: Sequence[int]
    payload_bytes: int
    slot_bytes: int

    def start(self, region: SlotRegion, after: Event | None) -> Arrival:
        """Begin; nothing is written before `after` is passed."""


class DirectSource:
    """Disk straight into the slot, on a device whose memory is the host's."""

    def __init__(self, key: BlockKey, reader: DiskReader, ranges: Sequence[FileRange], read_plan: ReadPlan) -> None:
        self._key, self._reader, self._ranges, self._read_plan = key, reader, ranges, read_plan
        self.offsets = read_plan.offsets
        self.payload_bytes = read_plan.payload_bytes
        self.slot_bytes = read_plan.slot_bytes

    def start(self, region: SlotRegion, after: Event | None) -> Arrival:
        assert region.memory is not None
        memory = region.memory[: self._read_plan.slot_bytes]
        return _DiskArrival(self._reader.read(self._ranges, self._read_plan, memory, name=self._key))


@dataclass(frozen=True, slots=True)
class _DiskArrival:
    transfer: Transfer

    def wait(self) -> Waits:
        return {self.transfer.link.name: self.transfer.wait()}

    def cancel(self) -> None:
        self.transfer.cancel()


class StagedSource:
    """Disk to a staging buffer to the device."""

    def __init__(
        self, key: BlockKey, reader: StagedReader, device: Device, ranges: Sequence[FileRange], read_plan: ReadPlan
    ) -> None:
        self._key, self._reader, self._device, self._ranges, self._read_plan = key, reader, device, ranges, read_plan
        self.offsets = read_plan.offsets
        self.payload_bytes = read_plan.payload_bytes
        self.slot_bytes = max(at + item.nbytes for at, item in zip(read_plan.offsets, ranges, strict=True))

    def start(self, region: SlotRegion, after: Event | None) -> Arrival:
        transfer = self._reader.start(self._key, self._ranges, self._read_plan, region.tensor[: self.slot_bytes], after)
        return _StagedArrival(transfer, self._device, self._reader.reader.link.name)


@dataclass(frozen=True, slots=True)
class _StagedArrival:
    transfer: StagedTransfer
    device: Device
    disk_name: str

    def wait(self) -> Waits:
        waited = self.transfer.wait_issued()
        assert self.transfer.copied is not None
        self.device.wait(self.transfer.copied)
        return {self.disk_name: waited}

    def cancel(self) -> None:
        self.transfer.cancel()


class HostSource:
    """Page-locked host memory to the device: one copy a block."""

    def __init__(self, key: BlockKey, device: Device, buffer: HostBuffer, offsets: Sequence[int], payload_bytes: int) -> None:
        self._key, self._device, self._buffer = key, device, buffer
        self.offsets = offsets
        self.payload_bytes = payload_bytes
        self.slot_bytes = buffer.nbytes

    def start(self, region: SlotRegion, after: Event | None) -> Arrival:
        size = self._buffer.nbytes
        copied = self._device.copy_in(region.tensor[:size], self._buffer.tensor[:size], after, self._key)
        return CopyArrival(self._device, [copied])


class DividedSource:
    """The device's rows of a block in page-locked host memory: a copy a tensor, since the other rows lie between them."""

    def __init__(self, key: BlockKey, device: Device, homes: Sequence[ParameterHome]) -> None:
        self._key, self._device, self._homes = key, device, homes
        self.offsets, self.slot_bytes = packed_offsets(homes)
        self.payload_bytes = sum(home.device_part.nbytes for home in homes)

    def start(self, region: SlotRegion, after: Event | None) -> Arrival:
        targets = views_of(self._homes, self.offsets, region.tensor)
        parts = [home.device_part for home in self._homes]
        copies = [self._device.copy_in(target, part, after, self._key) for target, part in zip(targets, parts, strict=True)]
        return CopyArrival(self._device, copies)


@dataclass(frozen=True, slots=True)
class CopyArrival:
    device: Device
    copies: list[Event]

    def wait(self) -> Waits:
        for copied in self.copies:
            self.device.wait(copied)
        return {}

    def cancel(self) -> None:
        for copied in self.copies:
            copied.synchronize()


class StreamedBlock:
    """A block that passes through the slots."""

    def __init__(self, key: BlockKey, homes: Sequence[ParameterHome], source: BlockSource) -> None:
        self.key = key
        self.homes = list(homes)
        self.source = source
        self._offsets = list(source.offsets)
        self._views: dict[int, list[torch.Tensor]] = {}

    def bind(self, first_slot: int, region: torch.Tensor) -> None:
        """Point the parameters into the slot."""
        if first_slot not in self._views:
            self._views[first_slot] = views_of(self.homes, self._offsets, region)
        for home, view in zip(self.homes, self._views[first_slot], strict=True):
            home.bind(view)

    def unbind(self) -> None:
        for home in self.homes:
            home.unbind()

    def forget_slots(self) -> None:
        """The slots are others from now on."""
        self._views.clear()

    def drop(self, home: ParameterHome) -> None:
        """Leave one parameter to the user; its bytes still come along."""
        index = self.homes.index(home)
        del self.homes[index], self._offsets[index]
        self._views.clear()


class ResidentBlock:
    """A block that stays on the device for the whole session.

    Args:
        buffer: its memory; None where the parameters already lie in fitting memory.
    """

    def __init__(
        self, key: BlockKey, homes: Sequence[ParameterHome], buffer: DeviceBuffer | None, offsets: Sequence[int]
    ) -> None:
        self.key = key
        self.homes = list(homes)
        self.nbytes = sum(home.tensor.nbytes for home in homes) if buffer is None else buffer.nbytes
        self.in_place = buffer is None
        if buffer is not None:
            for home, view in zip(self.homes, views_of(self.homes, offsets, buffer.tensor), strict=True):
                home.bind(view)

    def drop(self, home: ParameterHome) -> None:
        """Leave one parameter to the user."""
        self.homes.remove(home)

    def give_up(self) -> None:
        """Free the device memory; the parameters are at home afterwards, with the values that they have now."""
        for home in self.homes:
            if not self.in_place and home.tensor.data_ptr() == home.parameter.data_ptr():
                home.tensor = home.parameter.data.to("cpu", copy=True)
            home.unbind()


def views_of(homes: Sequence[ParameterHome], offsets: Sequence[int], memory: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of the homes' dtypes and shapes over `memory` (uint8), at `offsets`."""
    with torch.inference_mode(False):
        return [
            memory[offset : offset + home.device_part.nbytes].view(home.tensor.dtype).view(home.device_part.shape)
            for home, offset in zip(homes, offsets, strict=True)
        ]


def packed_offsets(homes: Sequence[ParameterHome]) -> tuple[list[int], int]:
    """Aligned places for the tensors one after another, and the bytes that they take in all."""
    offsets, end = [], 0
    for home in homes:
        offsets.append(end)
        end = align_up(end + home.device_part.nbytes)
    return offsets, end


class EmbeddingTable:
    """An embedding whose rows are fetched as they are looked up; the table itself is never loaded.

    Args:
        home: its weight, [rows, width].
        source: where the rows lie on disk; None to take them from the home in CPU memory.
    """

    def __init__(self, key: BlockKey, home: ParameterHome, reader: DiskReader | None, source: FileRange | None) -> None:
        self.key = key
        self.homes = [home]
        self.was_read_whole = False
        self.waited_seconds = 0.0
        """For rows from disk, since this was last set to 0."""
        self._reader, self._source = reader, source

    @property
    def on_disk(self) -> bool:
        """Its rows come from a file, but for those that somebody wrote."""
        return self._source is not None

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """The looked-up rows, [*indices.shape, width], on the device of `indices`."""
        home = self.homes[0]
        home.notice_changes()
        unique, places = torch.unique(indices, return_inverse=True)
        if len(unique) and not 0 <= int(unique[0]) <= int(unique[-1]) < len(home.tensor):
            raise IndexError(
                f"{home.name} has {len(home.tensor)} rows, and row {int(unique[-1])} or {int(unique[0])} was looked up"
            )
        if self._reader is None or self._source is None or home.modified:
            rows = home.tensor[unique.cpu()]
        else:
            rows = self._read(unique.cpu(), home.tensor)
        return rows.to(indices.device)[places]

    def whole(self, device: torch.device) -> torch.Tensor:
        """The whole table, for a forward that does otherwise than look rows up."""
        home = self.homes[0]
        home.notice_changes()
        self.was_read_whole = True
        if self._reader is None or self._source is None or home.modified:
            return home.tensor.to(device)
        table = torch.empty(home.tensor.shape, dtype=home.tensor.dtype)
        self._reader.read_rows(self._source, [0], table.nbytes, table)
        return table.to(device)

    def _read(self, unique: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        assert self._reader is not None
        assert self._source is not None
        rows = torch.empty((len(unique), table.shape[1]), dtype=table.dtype)
        width = table.shape[1] * table.element_size()
        begun = time.perf_counter()
        self._reader.read_rows(self._source, unique.tolist(), width, rows, self.key)
        self.waited_seconds += time.perf_counter() - begun
        return rows
