"""Experts as transformers lays them out: one module a layer, whose parameters hold all experts along their first dimension."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES, DTYPE_BYTES, BlockKey, FileRange, align_up

MARKS = ("has_gate", "has_bias", "is_transposed", "num_experts", "config")
"""What transformers' decorator of experts classes leaves on each of their modules."""

_PIECES = 2
"""Pieces of one expert's part of one parameter: gate and up, where they are separate."""

ExpertPieces = Sequence[Sequence[FileRange]]
"""The pieces of files that make up one parameter, by expert, in order."""


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """One expert's part of one parameter.

    Attributes:
        name: of the parameter in its module.
        offset: in the expert's slot.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return DTYPE_BYTES[str(self.dtype).removeprefix("torch.")] * torch.Size(self.shape).numel()


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """How one expert lies in a slot; layers of one layout share slots."""

    tensors: tuple[ExpertTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values alone."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def end(self) -> int:
        return self.tensors[-1].offset + self.tensors[-1].nbytes


@dataclass(slots=True, eq=False)
class ExpertsUnit:
    """The experts of one layer.

    Attributes:
        key: the module's path in the model.
        parameters: by their paths in the model, each [experts, rows, columns].
        count: of experts.
        layout: of one of them.
    """

    key: BlockKey
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    count: int
    layout: ExpertLayout

    @property
    def nbytes(self) -> int:
        """Bytes of one expert."""
        return self.layout.nbytes


def find_experts(model: nn.Module) -> list[ExpertsUnit]:
    """The modules whose experts can be brought one by one, in the order of the model."""
    return [unit for path, module in model.named_modules() if (unit := _unit(path, module)) is not None]


def undecorated_experts(model: nn.Module) -> list[str]:
    """Classes of modules that look like experts and are not laid out as transformers' interface wants them."""
    names = set()
    for module in model.modules():
        kind = type(module).__name__
        if kind.lower().endswith("experts") and _unit("", module) is None and next(module.parameters(), None) is not None:
            names.add(kind)
    return sorted(names)


def _unit(path: str, module: nn.Module) -> ExpertsUnit | None:
    # A forward of the instance's own would be passed over.
    if not all(hasattr(module, mark) for mark in MARKS) or "forward" in vars(module):
        return None
    count = module.num_experts
    # Biases, a row for each expert, stay with the layer: small, and taken for all rows at once.
    matrices = {name: value for name, value in module.named_parameters(recurse=False) if value.dim() == 3}
    if not matrices or not isinstance(count, int) or any(value.shape[0] != count for value in matrices.values()):
        return None
    parameters = {f"{path}.{name}" if path else name: value for name, value in matrices.items()}
    return ExpertsUnit(path, module, parameters, count, layout_of(matrices))


def layout_of(parameters: Mapping[str, torch.Tensor]) -> ExpertLayout:
    """The layout of one expert, given the parameters with all of them."""
    tensors = []
    end = 0
    for name, value in parameters.items():
        tensor = ExpertTensor(name, value.dtype, tuple(value.shape[1:]), align_up(end))
        tensors.append(tensor)
        end = tensor.offset + tensor.nbytes
    return ExpertLayout(tuple(tensors))


def expert_slot_bytes(layout: ExpertLayout) -> int:
    """What an expert takes in a slot, in whole units: each piece is read with up to a unit before and after it."""
    return align_up(layout.end, BLOCK_ALIGNMENT_BYTES) + 2 * BLOCK_ALIGNMENT_BYTES * _PIECES * len(layout.tensors)


def sliced(stored: FileRange, count: int) -> list[list[FileRange]]:
    """The pieces of experts that lie one after another in a file."""
    size = stored.nbytes // count
    return [[FileRange(stored.path, stored.offset + index * size, size)] for index in range(count)]
