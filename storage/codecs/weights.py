"""Weights that a file holds in fewer bytes than the model computes with, and what makes plain tensors of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from offload.storage.blocks import FileRange, TensorSpec


def piece_numbers(device: torch.device) -> int:
    """How many numbers are decoded at once where each takes memory of its own in fp32."""
    return 1 << 18 if device.type == "cpu" else 1 << 22


class WeightCodec(Protocol):
    """How weights are stored. Frozen: equal codecs make the same values of the same bytes.

    Attributes:
        name: how plans and reports call it.
    """

    @property
    def name(self) -> str: ...

    def decode(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Write the values to `out`, of a floating dtype: computed in fp32, and rounded once.

        Args:
            parts: uint8, one-dimensional, on the device of `out`: what the file holds, one after another.
        """
        ...

    def rows_together(self, shape: Sequence[int]) -> int:
        """Rows (of the first dimension) that are decoded together, each from its own bytes of a single part.

        `shape[0]` where all are.
        """
        ...


@dataclass(frozen=True, slots=True)
class EncodedTensor:
    """A tensor of the model, and the ranges of files that it is decoded from.

    Attributes:
        spec: what comes out.
        parts: as the codec takes them.
    """

    spec: TensorSpec
    codec: WeightCodec
    parts: tuple[FileRange, ...]

    @property
    def nbytes(self) -> int:
        """Decoded."""
        return self.spec.nbytes

    @property
    def stored_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


Source = FileRange | EncodedTensor
"""Where the values of a tensor are: bytes of a file as they are, or such as make it."""


def parts_of(source: Source) -> tuple[FileRange, ...]:
    """What is read of files for it."""
    return (source,) if isinstance(source, FileRange) else source.parts


@dataclass(frozen=True, slots=True)
class Cast:
    """Numbers of another dtype than the model's.

    Attributes:
        dtype: of the file, torch's name.
    """

    dtype: str

    @property
    def name(self) -> str:
        return self.dtype

    def decode(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        out.copy_(parts[0].view(getattr(torch, self.dtype)).view(out.shape))

    def rows_together(self, shape: Sequence[int]) -> int:
        return 1
