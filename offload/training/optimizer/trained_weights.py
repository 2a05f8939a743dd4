"""The trained weights, wherever they are: what the optimizer reads and writes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from offload.model.blocks import Structure, Unit
from offload.model.homes import ParameterHome
from offload.runtime.block_sources import HostSource
from offload.runtime.executor import LayerExecutor
from offload.runtime.placement import Placement
from offload.scheduler.sub_groups import StateLayout, SubGroup
from offload.storage.blocks import BlockKey, FileRange
from offload.storage.host_buffer import HostBuffer
from offload.storage.reader import DiskReader
from offload.storage.state_file import StateFile

OUTSIDE = "(no block)"
"""The block of what no block holds: adapters, a norm."""


class TrainedWeights:
    """What is trained, by block.

    Attributes:
        blocks: the homes of the trained parameters, in the order of computing; first what no block holds.
        homes: the same by name.

    Args:
        parameters: that are trained.
        structure: of the model; says which block a parameter belongs to.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        structure: Structure,
        placement: Placement,
        executor: LayerExecutor,
        reader: DiskReader,
    ) -> None:
        self._placement, self._executor, self._reader = placement, executor, reader
        self._units: dict[BlockKey, Unit] = {}
        self._changed: set[str] = set()
        self.blocks = self._found(model, parameters, structure)
        self.homes = {home.name: home for homes in self.blocks.values() for home in homes}
        self.layout: StateLayout | None = None

    def take_over(self) -> None:
        """From now on only the optimizer writes to them.

        Raises:
            TrainingError: if one of them cannot be written to.
        """
        for home in self.homes.values():
            home.check_trainable()
        for home in self.homes.values():
            home.leave_shield()
            home.trained = True

    def leave_files(self) -> None:
        """Weights that are stepped in CPU memory live there."""
        for key, unit in self._units.items():
            if self._in_file(key):
                self._placement.settle_in_memory(unit, "trained weights")
                self._replace(key)

    def note_changes(self) -> None:
        """See what the user wrote to since the last step."""
        self._changed = {name for name, home in self.homes.items() if home.was_changed}

    def accept_changes(self) -> None:
        """The step is over: what they are now is where they come from."""
        for home in self.homes.values():
            home.accept_changes()

    def in_place(self, group: SubGroup) -> list[torch.Tensor] | None:
        if self._in_file(group.block):
            return None
        return [self.homes[piece.parameter.name].parameter.data.view(-1)[piece.start : piece.stop] for piece in group.pieces]

    def read(self, group: SubGroup, targets: Sequence[torch.Tensor]) -> None:
        for piece, target in zip(group.pieces, targets, strict=True):
            home = self.homes[piece.parameter.name]
            source = self._placement.range_of(home) if self._in_file(group.block) else None
            if not isinstance(source, FileRange):
                target.copy_(home.parameter.data.view(-1)[piece.start : piece.stop])
            else:
                target.copy_(self._from_file(source, home.parameter.dtype, piece.start, piece.stop))

    def _from_file(self, source: FileRange, dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
        part = FileRange(source.path, source.offset + start * dtype.itemsize, (stop - start) * dtype.itemsize)
        load_plan = self._reader.plan([part])
        buffer = HostBuffer(load_plan.slot_bytes)
        self._reader.read(load_plan, buffer.memory[: load_plan.slot_bytes]).wait()
        return buffer.tensor[load_plan.offsets[0] : load_plan.offsets[0] + part.nbytes].view(dtype)

    def changed(self, group: SubGroup) -> bool:
        return any(piece.parameter.name in self._changed for piece in group.pieces)

    def moved(self, block: BlockKey, file: StateFile) -> None:
        if block not in self._units or not self._in_file(block):
            return
        storage = torch.UntypedStorage.from_file(file.path, False, file.nbytes)
        places: dict[str, tuple[FileRange, torch.Tensor]] = {}
        assert self.layout is not None
        for group in self.layout.of(block):
            for span in group.weights.spans:
                if span.piece.start == 0:
                    home = self.homes[span.piece.parameter.name]
                    at = FileRange(file.path, group.weights.offset + span.offset, home.tensor.nbytes)
                    places[home.name] = at, _file_view(storage, at, home.tensor)
        self._placement.settle_in_file(self._units[block], places)
        self._replace(block)

    def _found(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], structure: Structure
    ) -> dict[BlockKey, list[ParameterHome]]:
        left = {id(parameter) for parameter in parameters}
        blocks: dict[BlockKey, list[ParameterHome]] = {}
        units = {id(value) for unit in structure.units for value in unit.parameters.values()}
        for name, parameter in model.named_parameters():
            if id(parameter) in left - units:
                home = self._placement.home_of(parameter) or ParameterHome(name, parameter, parameter.data, parameter.data)
                blocks.setdefault(OUTSIDE, []).append(home)
        for unit in structure.units:
            for parameter in unit.parameters.values():
                placed = self._placement.home_of(parameter) if id(parameter) in left else None
                if placed is not None:
                    left.discard(id(parameter))
                    blocks.setdefault(unit.key, []).append(placed)
                    self._units[unit.key] = unit
        return blocks

    def _replace(self, key: BlockKey) -> None:
        if key in self._executor.blocks:
            self._executor.replace(self._placement.streamed[key])

    def _in_file(self, key: BlockKey) -> bool:
        if key in self._placement.tables and key not in self._placement.streamed:
            return self._placement.tables[key].on_disk
        block = self._placement.streamed.get(key)
        return block is not None and not isinstance(block.source, HostSource)


def _file_view(storage: Any, at: FileRange, like: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False):
        content = torch.empty(0, dtype=torch.uint8).set_(storage[at.offset : at.end])
        view: torch.Tensor = content.view(like.dtype).view(like.shape)
        return view
