"""Where optimizer state lives: what every such place gives, and what all of them share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from offload.scheduler.sub_groups import MASTER, Region, StateLayout, SubGroup, TensorSpan
from offload.storage.blocks import BlockKey
from offload.storage.host_buffer import HostBuffer
from offload.storage.state_file import StateFile

Tensors = dict[str, list[torch.Tensor]]
"""Tensors by kind of state, one for each piece; the weights under the empty name."""


class Weights(Protocol):
    """The trained weights, wherever they are."""

    def read(self, group: SubGroup, targets: Sequence[torch.Tensor]) -> None:
        """Copy the group's present weights to `targets`, in their dtype."""

    def in_place(self, group: SubGroup) -> list[torch.Tensor] | None:
        """The weights in ordinary memory, flat, a tensor for each piece; None if their home is a file."""

    def changed(self, group: SubGroup) -> bool:
        """The user wrote to some of them since the last step."""

    def moved(self, block: BlockKey, file: StateFile) -> None:
        """The block's weights are in `file` now, at the places of the layout."""


@dataclass(slots=True)
class StateGroup:
    """A sub-group where it is stepped.

    Attributes:
        tensors: flat; changed in place.
        buffer: that they lie in, if they came from a file.
    """

    group: SubGroup
    tensors: Tensors
    buffer: HostBuffer | None = None

    @property
    def targets(self) -> list[torch.Tensor]:
        """What the optimizer steps."""
        return self.tensors[MASTER if self.group.owns_master else ""]


class States(Protocol):
    """The states of all sub-groups."""

    layout: StateLayout
    nbytes: int
    """In CPU memory."""

    def begin(self) -> None:
        """A step begins: every group is taken and given back, in the layout's order."""

    def take(self, group: SubGroup) -> StateGroup:
        """The group, to be stepped."""

    def give_back(self, working: StateGroup) -> None:
        """The group was stepped: its weights follow from its masters."""

    def is_there(self, group: SubGroup) -> bool:
        """To take it means no wait."""

    def settle(self, block: BlockKey) -> None:
        """What was given back of the block is in its place."""

    def end(self) -> None:
        """All that was given back is in its place."""

    def snapshot(self, new_file: Callable[[], StateFile]) -> "StateSnapshot":
        """A file with everything as it is now, which no later step writes to.

        Args:
            new_file: makes one, where the states are in memory.
        """

    def restore(self, file: StateFile) -> "StateSnapshot":
        """Go on from a file that was frozen, which is not written to; the weights follow."""

    def close(self) -> None:
        """Give memory and files back."""


class StateSnapshot(Protocol):
    """Everything as it was at one moment, on its way to a file."""

    file: StateFile
    written: bool
    """All of it is in the file, if not durable yet."""

    def wait(self) -> None:
        """Return when it is durable. Raises what went wrong on the way."""

    def release(self) -> None:
        """This process needs it no more: its file is closed."""


def views(memory: torch.Tensor, region: Region, at: int) -> Tensors:
    """The region's spans as flat tensors over `memory` (uint8), in which it begins at `at`."""
    found: Tensors = {}
    for span in region.spans:
        found.setdefault(span.kind, []).append(_view(memory, span, at))
    return found


def _view(memory: torch.Tensor, span: TensorSpan, at: int) -> torch.Tensor:
    start = at + span.offset
    with torch.inference_mode(False):
        view: torch.Tensor = memory[start : start + span.nbytes].view(getattr(torch, span.dtype))
        return view


def read_weights(file: StateFile, group: SubGroup, staging: HostBuffer, weights: Weights) -> None:
    """The group's weights that are in memory, from a file."""
    targets = weights.in_place(group)
    if targets is not None:
        file.read(group.weights.offset, staging.memory[: group.weights.nbytes])
        for target, source in zip(targets, views(staging.tensor, group.weights, 0)[""], strict=True):
            target.copy_(source)
