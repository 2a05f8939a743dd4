"""Four bits that stand for one of sixteen numbers, scaled by block: as bitsandbytes stores weights (NF4 and FP4).

NF4: QLoRA, arXiv 2305.14314. The numbers are stored with the weights, so that both are read alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offload.storage.codecs.weights import piece_numbers
from offload.storage.native.decoders import decode_four_bits


@dataclass(frozen=True, slots=True)
class FourBits:
    """Parts: bytes (the first number in the high bits), scales, the sixteen numbers.

    If the scales are in eight bits, also their own scales, and the 256 numbers that they stand for.

    Attributes:
        kind: `nf4` or `fp4`.
        block: numbers that share a scale.
        scale_block: scales that share one of their own; 0 where they are fp32.
        offset: added to the scales where they are in eight bits.
    """

    kind: str
    block: int
    scale_block: int = 0
    offset: float = 0.0

    @property
    def name(self) -> str:
        return self.kind

    def decode(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        scales, numbers = self._scales(parts), parts[2].view(torch.float32)
        if decode_four_bits(parts[0], self.block, scales, numbers, out):
            return
        values, step = out.view(-1), max(1, piece_numbers(out.device) // self.block)
        for begin in range(0, len(scales), step):
            end = min((begin + step) * self.block, len(values))
            stored = parts[0][begin * self.block // 2 : (end + 1) // 2]
            places = torch.empty(len(stored), 2, dtype=torch.int32, device=out.device)
            places[:, 0], places[:, 1] = stored >> 4, stored & 15
            found = numbers.index_select(0, places.view(-1))[: end - begin * self.block]
            spread = scales[begin : begin + step].repeat_interleave(self.block)[: len(found)]
            values[begin * self.block : end].copy_(found.mul_(spread))

    def rows_together(self, shape: Sequence[int]) -> int:
        return shape[0]

    def _scales(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        if not self.scale_block:
            return parts[1].view(torch.float32)
        known, own = parts[4].view(torch.float32), parts[3].view(torch.float32)
        scales = known.index_select(0, parts[1].int())
        return scales.mul_(own.repeat_interleave(self.scale_block)[: len(scales)]).add_(self.offset)
