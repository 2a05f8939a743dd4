"""Integers with a scale and a minimum for each group of numbers (asymmetric round-to-nearest)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

GROUP = 32
"""Numbers that share a scale."""


@dataclass(frozen=True, slots=True)
class AffineGroups:
    """Codes of `bits` a number, with a 16-bit minimum and scale for each group of 32; one part, uint8.

    Attributes:
        bits: 8 or 4.
    """

    bits: int

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def nbytes(self, length: int) -> int:
        """Bytes of `length` numbers that follow one another: codes, and two 16-bit numbers a group."""
        group, groups = _grouping(length)
        return groups * (group * self.bits // 8 + 4)

    def parts(self, lines: int, length: int, device: torch.device) -> list[torch.Tensor]:
        return [torch.empty(lines, self.nbytes(length), dtype=torch.uint8, device=device)]

    def encode(self, values: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        length = values.shape[-1]
        group, groups = _grouping(length)
        flat = values.reshape(-1, length).float()
        if groups * group > length:
            flat = torch.cat([flat, flat[:, -1:].expand(-1, groups * group - length)], dim=1)
        grouped = flat.view(-1, groups, group)
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        minimum = low.half()
        scale = ((high - minimum.float()) / (2**self.bits - 1)).half()
        steps = (grouped - minimum.float()) / scale.float().clamp(min=torch.finfo(torch.float16).tiny)
        codes = steps.round().clamp(0, 2**self.bits - 1).nan_to_num().to(torch.uint8)
        if self.bits == 4:
            codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
        packed = torch.cat([codes, minimum.view(torch.uint8), scale.view(torch.uint8)], dim=-1)
        parts[0].view(-1).copy_(packed.view(-1))

    def decode(self, parts: Sequence[torch.Tensor], length: int) -> torch.Tensor:
        group, groups = _grouping(length)
        code_bytes = group * self.bits // 8
        packed = parts[0].view(-1, groups, code_bytes + 4)
        codes, rest = packed[..., :code_bytes], packed[..., code_bytes:].contiguous().view(torch.float16).float()
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).view(-1, groups, group)
        return (codes.float() * rest[..., 1:] + rest[..., :1]).view(-1, groups * group)[:, :length]


def _grouping(length: int) -> tuple[int, int]:
    """The size of a group, even, and the number of them."""
    group = min(GROUP, length + length % 2)
    return group, -(-length // group)
