"""8-bit numbers with scales beside them: one for all, one a row, or one for each tile of a grid."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offload.storage.codecs.weights import piece_numbers
from offload.storage.native.decoders import decode_tiles


@dataclass(frozen=True, slots=True)
class ScaledNumbers:
    """Two parts: floats or integers of eight bits, and their scales.

    Attributes:
        numbers, scales: their dtypes, torch's names; scales of uint8 are exponents (E8M0): 2 ** (byte - 127).
        grid: scales along the rows and along the columns; each is that of a tile of equal size.
    """

    numbers: str
    scales: str
    grid: tuple[int, int]

    @property
    def name(self) -> str:
        return "int8" if self.numbers == "int8" else "fp8"

    def decode(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        scales = self._scales(parts[1])
        if decode_tiles(self.numbers, parts[0], scales, self.grid, out):
            return
        stored = parts[0].view(getattr(torch, self.numbers)).view(out.shape)
        tile_rows, tile_columns = out.shape[0] // self.grid[0], out.shape[1] // self.grid[1]
        step = max(1, piece_numbers(out.device) // (tile_rows * out.shape[1]))
        for begin in range(0, self.grid[0], step):
            count = min(step, self.grid[0] - begin)
            rows = slice(begin * tile_rows, (begin + count) * tile_rows)
            tiles = stored[rows].float().view(count, tile_rows, self.grid[1], tile_columns)
            tiles.mul_(scales[begin : begin + count, None, :, None])
            out[rows].copy_(tiles.view(count * tile_rows, -1))

    def rows_together(self, shape: Sequence[int]) -> int:
        return shape[0]

    def _scales(self, part: torch.Tensor) -> torch.Tensor:
        scales = part.view(getattr(torch, self.scales)).view(self.grid)
        return (scales.float() - 127.0).exp2() if self.scales == "uint8" else scales.float()


_OVER_127 = 7.874015718698502e-3
"""As bitsandbytes has it: a product with it is rounded after that with the row's largest number."""


@dataclass(frozen=True, slots=True)
class RowMaxima:
    """LLM.int8() (arXiv 2208.07339). Two parts: integers of eight bits, and the largest number of each row, fp32."""

    @property
    def name(self) -> str:
        return "int8"

    def decode(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        maxima = parts[1].view(torch.float32)
        if decode_tiles("int8", parts[0], maxima, (len(out), 1), out, _OVER_127):
            return
        stored = parts[0].view(torch.int8).view(out.shape)
        step = max(1, piece_numbers(out.device) // out.shape[1])
        for begin in range(0, len(out), step):
            rows = slice(begin, begin + step)
            out[rows].copy_(stored[rows].float().mul_(maxima[rows, None]).mul_(_OVER_127))

    def rows_together(self, shape: Sequence[int]) -> int:
        return shape[0]
