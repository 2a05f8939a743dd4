"""A block whose forward's tensors stay on the device for backward: only its weights are brought again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offload.model.homes import ParameterHome
from offload.storage.blocks import BlockKey
from offload.storage.errors import SessionError
from offload.training.backward.recompute import Backward


@dataclass(frozen=True, slots=True)
class _SavedTensor:
    tensor: torch.Tensor
    version: int


@dataclass(frozen=True, slots=True)
class _Weight:
    """A view of a weight that will lie elsewhere; `offset` from its first element."""

    home: ParameterHome
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class SavedFrame:
    """One call of a block.

    Args:
        key, uses: of the unit, and of the blocks that hold its weights.
        homes: of these weights.
    """

    def __init__(
        self, backward: Backward, key: BlockKey, uses: tuple[BlockKey, ...], homes: list[ParameterHome], module: nn.Module
    ) -> None:
        self.key, self.uses = key, uses
        self._backward = backward
        self._homes = homes
        self._module = module
        self._versions = self._seen_versions()

    def pack(self, tensor: torch.Tensor) -> Any:
        """Instead of a weight, where to find it; anything else is kept."""
        if not self._backward.in_slots(tensor):
            return _SavedTensor(tensor.detach(), tensor._version)
        for home in self._homes:
            data = home.parameter.data
            begin, at = data.data_ptr(), tensor.data_ptr()
            if data.dtype == tensor.dtype and begin <= at < begin + data.nbytes:
                return _Weight(home, tuple(tensor.shape), tuple(tensor.stride()), (at - begin) // data.element_size())
        # A weight seen as another dtype.
        return _SavedTensor(tensor.detach().clone(), 0)

    def unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, _SavedTensor):
            if packed.tensor._version != packed.version:
                raise SessionError(f"a tensor that backward of {self.key} needs was written to")
            return packed.tensor
        with self._backward.lock:
            self._backward.onload(self)
            data = packed.home.parameter.data
            view: torch.Tensor = data.as_strided(packed.size, packed.stride, data.storage_offset() + packed.offset)
            return view

    def recompute(self, generation_of: Callable[[torch.Tensor], int | None]) -> None:
        """Nothing is computed again."""
        if self._seen_versions() != self._versions:
            raise SessionError(
                f"a parameter of {self.key} was changed between forward and backward, which would give wrong gradients; step "
                "the optimizer after backward"
            )

    def forget(self) -> None:
        pass

    def prefetch(self) -> None:
        pass

    def _seen_versions(self) -> dict[int, int]:
        return {id(value): value._version for value in self._module.parameters()}
