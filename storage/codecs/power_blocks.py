"""Levels that lie closer together near zero, with a scale for each block of numbers (after arXiv 2110.02861)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

BLOCK = 256
"""Numbers that share a scale."""


@dataclass(frozen=True, slots=True)
class PowerBlocks:
    """A number is `scale * (level / most) ** power`, with the level's sign; two parts, levels and fp32 scales.

    Attributes:
        levels: the dtype of levels: int8, or uint8 for numbers without a sign.
        power: how much closer they lie together near zero.
    """

    levels: torch.dtype
    power: int

    @property
    def name(self) -> str:
        return f"power{self.power}-{str(self.levels).removeprefix('torch.')}"

    def nbytes(self, length: int) -> int:
        return length + 4 * -(-length // BLOCK)

    def parts(self, lines: int, length: int, device: torch.device) -> list[torch.Tensor]:
        scales = torch.empty(lines, -(-length // BLOCK), device=device)
        return [torch.empty(lines, length, dtype=self.levels, device=device), scales]

    def encode(self, values: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        """Write the nearest levels; nothing but zero becomes zero, since second moments are divided by."""
        levels, scale = parts
        blocks = _blocks_of(values)
        scale.copy_(blocks.abs().amax(-1).view(scale.shape))
        share = blocks.div(scale.view(-1, 1).clamp(min=torch.finfo(torch.float32).tiny))
        most = torch.iinfo(self.levels).max
        found = share.abs().pow_(1 / self.power).mul_(most).round_().clamp_(1, most).mul_(share.sign())
        levels.copy_(_lines_of(found, values.shape[-1]).view(levels.shape))

    def decode(self, parts: Sequence[torch.Tensor], length: int) -> torch.Tensor:
        levels, scale = parts
        share = _blocks_of(levels.float().view(-1, length)).div_(torch.iinfo(self.levels).max)
        return _lines_of(share.sign() * share.abs().pow_(self.power) * scale.view(-1, 1), length).contiguous()


def _blocks_of(values: torch.Tensor) -> torch.Tensor:
    """[lines * blocks, 256], each line filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -values.shape[-1] % BLOCK)).view(-1, BLOCK)


def _lines_of(blocks: torch.Tensor, length: int) -> torch.Tensor:
    return blocks.view(-1, -(-length // BLOCK) * BLOCK)[:, :length]
