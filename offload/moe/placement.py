"""Where experts come from: each layer's source, as the plan and the files have it."""

from collections.abc import Mapping, Sequence

from offload.model.experts import ExpertPieces, ExpertsUnit, sliced
from offload.moe.slots import ExpertSource, FileExperts, HostExperts
from offload.runtime.machine import Machine
from offload.runtime.placement import Placement
from offload.scheduler.plan import Plan
from offload.storage.blocks import FileRange
from offload.storage.staging import StagedReader

EXPERTS = "experts"
"""What the ledgers call them."""


class ExpertPlacement:
    """The experts of a model, on their tiers.

    Args:
        placement: knows where parameters lie, and charges what is held.
        pieces: where experts lie whose parameters are stand-ins, by parameter.
    """

    def __init__(
        self,
        machine: Machine,
        placement: Placement,
        units: Sequence[ExpertsUnit],
        pieces: Mapping[str, ExpertPieces],
    ) -> None:
        self._placement, self._units, self._pieces = placement, units, pieces
        self._reader, self._device, self._progress = machine.host.reader, machine.device, machine.host.progress
        self._memory = machine.host.memory
        self._staged: StagedReader | None = None

    def apply(self, plan: Plan) -> list[ExpertSource]:
        """Make the source of each layer. What only memory holds is spilled first; then CPU memory takes what the plan says.

        Raises:
            DiskFull, ReadError: as placing anything else does.
        """
        self._placement.spill([unit for unit in self._units if not self._located(unit)])
        if plan.experts.staging_count and not self._device.shares_host_memory:
            self._staged = self._memory.open_staging(self._reader, plan.experts.slot_bytes, plan.experts.staging_count)
        from_files = [
            FileExperts(unit, self._pieces_of(unit), self._reader, self._staged, self._device) for unit in self._units
        ]
        if self._device.shares_host_memory or not plan.experts.in_host_memory:
            return list(from_files)
        counts = _share_out(plan.experts.in_host_memory, [unit.count for unit in self._units])
        done, total = 0, sum(count * unit.nbytes for count, unit in zip(counts, self._units, strict=True))
        sources: list[ExpertSource] = []
        for unit, files, count in zip(self._units, from_files, counts, strict=True):
            self._progress("loading experts", done, total)
            sources.append(self._to_host_memory(unit, files, count, plan.experts.slot_bytes))
            done += count * unit.nbytes
        self._progress("loading experts", total, total)
        return sources

    def close(self) -> None:
        if self._staged is not None:
            self._staged.close()

    def _located(self, unit: ExpertsUnit) -> bool:
        """True if files hold all of it."""
        return all(
            name in self._pieces or self._placement.source_of(name, value) is not None
            for name, value in unit.parameters.items()
        )

    def _pieces_of(self, unit: ExpertsUnit) -> list[ExpertPieces]:
        found: list[ExpertPieces] = []
        for name, value in unit.parameters.items():
            if name in self._pieces:
                found.append(self._pieces[name])
            else:
                stored = self._placement.source_of(name, value)
                assert isinstance(stored, FileRange)
                found.append(sliced(stored, unit.count))
        return found

    def _to_host_memory(self, unit: ExpertsUnit, files: FileExperts, count: int, stride_bytes: int) -> ExpertSource:
        if not count:
            return files
        buffer = self._memory.allocate(count * stride_bytes, EXPERTS)
        self._memory.keep(buffer)
        for expert in range(count):
            load_plan = files.load_plan(expert, range(len(unit.layout.tensors)))
            memory = buffer.memory[expert * stride_bytes : expert * stride_bytes + load_plan.slot_bytes]
            self._reader.read(load_plan, memory).wait()
        return HostExperts(unit, buffer, count, stride_bytes, self._memory, files)


def _share_out(total: int, counts: Sequence[int]) -> list[int]:
    """As many for each layer as for the next, as far as each has them."""
    given = [0] * len(counts)
    order = sorted((index, layer) for layer, count in enumerate(counts) for index in range(count))
    for _, layer in order[:total]:
        given[layer] += 1
    return given
