"""Experts in device slots, and how they get there: from files, or from CPU memory."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from offload.model.experts import ExpertLayout, ExpertPieces, ExpertsUnit
from offload.model.homes import ParameterHome
from offload.model.placeholders import paths_of
from offload.runtime.block_sources import DirectSource, SlotRegion, StagedSource
from offload.runtime.page_locked import PageLockedMemory
from offload.storage.arrival import Arrival, CopyArrival, Waits
from offload.storage.blocks import FileRange
from offload.storage.devices.base import Device, Event
from offload.storage.host_buffer import HostBuffer
from offload.storage.load_plan import LoadPlan
from offload.storage.read_plan import plan_reads_at
from offload.storage.reader import DiskReader
from offload.storage.staging import StagedReader

Pool = Mapping[str, torch.Tensor]
"""The parameters of a module of experts with slots in place of experts: [slots, ...], by name in the module."""


class ExpertSource(Protocol):
    """How the experts of one layer get into slots."""

    def start(self, expert: int, tensors: Sequence[int], region: SlotRegion, after: Event | None) -> Arrival:
        """Begin; nothing is written before `after` is passed.

        Args:
            tensors: which of the layout's, rising.
        """


class FileExperts:
    """From files, in pieces.

    Args:
        pieces: of each parameter, in the order of the layout.
        staged: between disk and a device with memory of its own; None where the device's memory is the host's.
    """

    def __init__(
        self,
        unit: ExpertsUnit,
        pieces: Sequence[ExpertPieces],
        reader: DiskReader,
        staged: StagedReader | None,
        device: Device,
    ) -> None:
        self._unit, self._pieces, self._reader, self._staged, self._device = unit, pieces, reader, staged, device
        for path in paths_of(pieces):
            reader.engine.open(path)

    def start(self, expert: int, tensors: Sequence[int], region: SlotRegion, after: Event | None) -> Arrival:
        key = f"{self._unit.key}.{expert}"
        load_plan = self.load_plan(expert, tensors)
        if self._staged is None:
            return DirectSource(key, self._reader, load_plan).start(region, after)
        return StagedSource(key, self._staged, load_plan).start(region, after)

    def load_plan(self, expert: int, tensors: Sequence[int]) -> LoadPlan:
        """The expert's pieces, and the recipe that brings them to their places."""
        ranges: list[FileRange] = []
        targets: list[int] = []
        for index in tensors:
            end = self._unit.layout.tensors[index].offset
            for piece in self._pieces[index][expert]:
                ranges.append(piece)
                targets.append(end)
                end += piece.nbytes
        return LoadPlan.plain(ranges, plan_reads_at(ranges, targets, self._reader.engine.unit_bytes))


class HostExperts:
    """From page-locked CPU memory, where each lies as in a slot; others from elsewhere.

    Args:
        buffer: the first experts, `stride_bytes` apart.
    """

    def __init__(
        self,
        unit: ExpertsUnit,
        buffer: HostBuffer,
        count: int,
        stride_bytes: int,
        memory: PageLockedMemory,
        others: ExpertSource,
    ) -> None:
        self.count = count
        self.pool = pool_of(unit.layout, buffer.tensor, count, stride_bytes)
        """Where the CPU computes with them."""
        self._unit, self._buffer, self._stride, self._memory, self._others = unit, buffer, stride_bytes, memory, others

    def start(self, expert: int, tensors: Sequence[int], region: SlotRegion, after: Event | None) -> Arrival:
        if expert >= self.count:
            return self._others.start(expert, tensors, region, after)
        first, last = self._unit.layout.tensors[tensors[0]], self._unit.layout.tensors[tensors[-1]]
        begin, end = first.offset, last.offset + last.nbytes
        source = self._buffer.tensor[expert * self._stride + begin : expert * self._stride + end]
        copies = [(region.tensor[begin:end], source)]
        return self._memory.start_copy(self._buffer, copies, after, f"{self._unit.key}.{expert}")


class HomeExperts:
    """From the parameters as the user changed them."""

    def __init__(self, unit: ExpertsUnit, homes: Sequence[ParameterHome], device: Device) -> None:
        self._unit, self._homes, self._device = unit, homes, device

    def start(self, expert: int, tensors: Sequence[int], region: SlotRegion, after: Event | None) -> Arrival:
        copies = []
        for tensor, home in ((self._unit.layout.tensors[index], self._homes[index]) for index in tensors):
            target = region.tensor[tensor.offset : tensor.offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies.append((target, home.tensor[expert].detach()))
        return CopyArrival(self._device, [self._device.copy_in(copies, [after], f"{self._unit.key}.{expert}")])


class ExpertSlots:
    """The slots, and what is on its way into them.

    Args:
        units: the layers.
        sources: of each.
        slot_count, slot_bytes: of the device memory that experts share.
    """

    def __init__(
        self, device: Device, units: Sequence[ExpertsUnit], sources: Sequence[ExpertSource], slot_count: int, slot_bytes: int
    ) -> None:
        self.sources = list(sources)
        self.copied_bytes = 0
        self.asynchronous = not device.shares_host_memory
        self._device = device
        self._units = list(units)
        self._slot_bytes = slot_bytes
        self._arena = device.allocate(slot_bytes * slot_count)
        self._memory = getattr(self._arena, "memory", None) if device.shares_host_memory else None
        pools = {unit.layout: pool_of(unit.layout, self._arena.tensor, slot_count, slot_bytes) for unit in units}
        self.pools: list[Pool] = [pools[unit.layout] for unit in units]
        """All slots as parameters, for each layer."""
        self._arrivals: dict[int, Arrival] = {}
        self._last_use: dict[int, Event] = {}

    @property
    def arena(self) -> torch.Tensor:
        return self._arena.tensor

    def in_host_memory(self, layer: int, expert: int) -> bool:
        """True if the CPU could compute with it where it is."""
        source = self.sources[layer]
        return isinstance(source, HostExperts) and expert < source.count

    def host_pool(self, layer: int) -> Pool:
        """A layer's parameters with the experts that are in CPU memory, where there are some."""
        source = self.sources[layer]
        assert isinstance(source, HostExperts)
        return source.pool

    def slot(self, slot: int) -> torch.Tensor:
        """The bytes of one slot."""
        return self._arena.tensor[slot * self._slot_bytes : (slot + 1) * self._slot_bytes]

    def begin(self, layer: int, expert: int, slot: int, tensors: Sequence[int] = ()) -> None:
        """Start to bring an expert into a slot. What was on its way there is over first.

        Args:
            tensors: which of the layout's, rising; all of them by default.
        """
        self.cancel(slot)
        layout = self._units[layer].layout
        tensors = tensors or range(len(layout.tensors))
        start = slot * self._slot_bytes
        memory = None if self._memory is None else self._memory[start : start + self._slot_bytes]
        region = SlotRegion(self.slot(slot), memory)
        self._arrivals[slot] = self.sources[layer].start(expert, tensors, region, self._last_use.get(slot))
        self.copied_bytes += sum(layout.tensors[index].nbytes for index in tensors)

    def wait(self, slots: Sequence[int]) -> Waits:
        """Return when compute may use these slots; seconds waited, by link.

        Raises:
            ReadError: if the disk failed; the slots are empty then.
        """
        waited: Waits = {}
        for slot in slots:
            arrival = self._arrivals.pop(slot, None)
            for link, seconds in arrival.wait().items() if arrival is not None else ():
                waited[link] = waited.get(link, 0.0) + seconds
        return waited

    def is_coming(self, slot: int) -> bool:
        """True if nobody has waited for it yet."""
        return slot in self._arrivals

    def used(self, slots: Sequence[int]) -> None:
        """Compute was submitted that uses these slots."""
        event = self._device.record()
        for slot in slots:
            self._last_use[slot] = event

    def cancel(self, slot: int) -> None:
        """Nothing writes into the slot afterwards."""
        arrival = self._arrivals.pop(slot, None)
        if arrival is not None:
            arrival.cancel()

    def settle(self) -> list[int]:
        """Nothing is on its way afterwards; the slots whose experts never came."""
        slots = list(self._arrivals)
        for slot in slots:
            self.cancel(slot)
        return slots


def pool_of(layout: ExpertLayout, memory: torch.Tensor, count: int, stride_bytes: int) -> dict[str, torch.Tensor]:
    """Views of `memory` (uint8) in which slots `stride_bytes` apart are the first dimension."""
    pool = {}
    with torch.inference_mode(False):
        for tensor in layout.tensors:
            typed = memory.view(tensor.dtype)
            size = typed.element_size()
            inner = torch.empty(tensor.shape, device="meta").stride()
            pool[tensor.name] = typed.as_strided((count, *tensor.shape), (stride_bytes // size, *inner), tensor.offset // size)
    return pool
