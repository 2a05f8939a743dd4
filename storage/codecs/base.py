"""What a codec is: numbers in fewer bytes, and back."""

from collections.abc import Sequence
from typing import Protocol

import torch


class Codec(Protocol):
    """Encodes lines of numbers, each by itself, into a few tensors.

    Attributes:
        name: how plans and files call it.
    """

    @property
    def name(self) -> str: ...

    def nbytes(self, length: int) -> int:
        """Bytes of one encoded line of `length` numbers, all its parts together."""
        ...

    def parts(self, lines: int, length: int, device: torch.device) -> list[torch.Tensor]:
        """New tensors on `device` that `lines` lines of `length` numbers are encoded into, uninitialised."""
        ...

    def encode(self, values: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        """Write the code of `values`, [lines, length] of a floating dtype, into `parts`, of the shapes that `parts` gives."""
        ...

    def decode(self, parts: Sequence[torch.Tensor], length: int) -> torch.Tensor:
        """What the code stands for, fp32 [lines, length]."""
        ...
