"""How the bytes of a block get into a slot: from disk, from CPU memory, or in part."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from offload.model.homes import ParameterHome
from offload.runtime.page_locked import PageLockedMemory
from offload.storage.arrival import ARRIVED, Arrival, DecodedArrival
from offload.storage.blocks import BlockKey, align_up
from offload.storage.devices.base import Event, unversioned
from offload.storage.host_buffer import HostBuffer
from offload.storage.load_plan import LoadPlan
from offload.storage.reader import DiskReader
from offload.storage.staging import StagedReader


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
        slot_bytes: what the block takes in the slots.
    """

    @property
    def offsets(self) -> Sequence[int]: ...

    @property
    def slot_bytes(self) -> int: ...

    def start(self, region: SlotRegion, after: Event | None) -> Arrival:
        """Begin; nothing is written before `after` is passed."""

    def brings(self, home: ParameterHome) -> bool:
        """It reads the home's own memory, so that it brings what was written there before it began."""


class DirectSource:
    """Disk straight into the slot, on a device whose memory is the host's."""

    def __init__(self, key: BlockKey, reader: DiskReader, load_plan: LoadPlan) -> None:
        self._key, self._reader, self._load_plan = key, reader, load_plan
        self.offsets = load_plan.offsets
        self.slot_bytes = load_plan.slot_bytes

    def start(self, region: SlotRegion, after: Event | None) -> Arrival:
        assert region.memory is not None
        load_plan, memory = self._load_plan, region.memory[: self.slot_bytes]
        read = self._reader.read(load_plan.stored, load_plan.read_into(memory), name=self._key)
        return DecodedArrival(read, lambda: load_plan.decode(_bytes(memory))) if load_plan.steps else read

    def brings(self, home: ParameterHome) -> bool:
        return False


class StagedSource:
    """Disk to a staging buffer to the device."""

    def __init__(self, key: BlockKey, reader: StagedReader, load_plan: LoadPlan) -> None:
        self._key, self._reader, self._load_plan = key, reader, load_plan
        self.offsets = load_plan.offsets
        self.slot_bytes = load_plan.device_slot_bytes

    def start(self, region: SlotRegion, after: Event | None) -> Arrival:
        return self._reader.start(self._key, self._load_plan, region.tensor[: self.slot_bytes], after)

    def brings(self, home: ParameterHome) -> bool:
        return False


class HostSource:
    """Page-locked host memory to the device: one copy a block."""

    def __init__(self, key: BlockKey, memory: PageLockedMemory, buffer: HostBuffer, offsets: Sequence[int]) -> None:
        self._key, self._memory, self._buffer = key, memory, buffer
        self.offsets = offsets
        self.slot_bytes = buffer.nbytes

    def start(self, region: SlotRegion, after: Event | None) -> Arrival:
        size = self._buffer.nbytes
        return self._memory.start_copy(self._buffer, [(region.tensor[:size], self._buffer.tensor[:size])], after, self._key)

    def brings(self, home: ParameterHome) -> bool:
        return self._buffer.holds(home.tensor)


class EncodedSource:
    """Host memory that holds a block in its stored form: what crosses a bus is small, and is decoded in the slot.

    Args:
        memory: of the session, which keeps `buffer`.
        buffer: filled by whoever comes first, where the device's memory is the host's; filled already beside another.
    """

    def __init__(
        self, key: BlockKey, memory: PageLockedMemory, buffer: HostBuffer, reader: DiskReader, load_plan: LoadPlan
    ) -> None:
        self.buffer = buffer
        self._key, self._memory, self._reader, self._load_plan = key, memory, reader, load_plan
        self.offsets = load_plan.offsets
        self.slot_bytes = load_plan.slot_bytes
        self._filled = False

    def start(self, region: SlotRegion, after: Event | None) -> Arrival:
        if region.memory is None:
            return self._copy(region.tensor[: self.slot_bytes], after)
        load_plan, memory = self._load_plan, region.memory[: self.slot_bytes]
        return DecodedArrival(self._stored(), lambda: load_plan.decode(_bytes(memory), self.buffer.tensor))

    def _stored(self) -> Arrival:
        if self._filled:
            return ARRIVED
        stored = self._load_plan.stored

        def filled() -> None:
            self._filled = True

        return self._reader.read(stored, self.buffer.memory[: stored.slot_bytes], filled, self._key)

    def _copy(self, slot: torch.Tensor, after: Event | None) -> Arrival:
        target = self._load_plan.stored_part(slot)
        copies = [(target, self.buffer.tensor[: len(target)])]
        return self._memory.start_copy(self.buffer, copies, after, self._key, lambda: self._load_plan.decode(unversioned(slot)))

    def brings(self, home: ParameterHome) -> bool:
        return False


class DividedSource:
    """The device's rows of a block in page-locked host memory: a copy a tensor, since the other rows lie between them."""

    def __init__(
        self,
        key: BlockKey,
        memory: PageLockedMemory,
        buffer: HostBuffer,
        places: Sequence[int],
        homes: Sequence[ParameterHome],
    ) -> None:
        self._key, self._memory, self._buffer, self._homes = key, memory, buffer, homes
        self._parts = views_of(homes, places, buffer.tensor)
        self.offsets, self.slot_bytes = packed_offsets(homes)

    def start(self, region: SlotRegion, after: Event | None) -> Arrival:
        targets = views_of(self._homes, self.offsets, region.tensor)
        return self._memory.start_copy(self._buffer, list(zip(targets, self._parts, strict=True)), after, self._key)

    def brings(self, home: ParameterHome) -> bool:
        return self._buffer.holds(home.tensor)


def _bytes(memory: memoryview) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.frombuffer(memory, dtype=torch.uint8)


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
