"""The block types of GGUF files, as ggml defines them: some numbers that share a scale, or a few.

Each decoder computes in the order of ggml's reference (`dequantize_row_*` in ggml-quants.c), in fp32, so that the values are
those of `gguf.quants.dequantize`, bit by bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from offload.storage.gguf_header import GGML_TYPES
from offload.storage.native.decoders import decode_ggml

_SIZES = {name: (numbers, nbytes) for name, numbers, nbytes in GGML_TYPES.values()}
_NUMBERS = {name: number for number, (name, _, _) in GGML_TYPES.items()}

_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the numbers that four bits stand for (E2M1): the scale is halved for it."""


@dataclass(frozen=True, slots=True)
class GgmlBlocks:
    """A tensor in blocks of one ggml type; one part.

    Attributes:
        name: of the type, such as `Q4_K`.
    """

    name: str

    def decode(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        if self.decode_natively(parts[0], out):
            return
        numbers, nbytes = _SIZES[self.name]
        out.view(-1, numbers).copy_(_DECODERS[self.name](parts[0].view(-1, nbytes)).view(-1, numbers))

    def decode_natively(self, blocks: torch.Tensor, out: torch.Tensor, head_rows: int = 0) -> bool:
        """True if the compiled decoders did it.

        Args:
            head_rows: as `decode_ggml` has it.
        """
        blocks_in_all = blocks.numel() // _SIZES[self.name][1]
        rows = len(out) if out.dim() > 1 else blocks_in_all
        return decode_ggml(_NUMBERS[self.name], blocks, rows, blocks_in_all // max(1, rows), out, head_rows)

    def rows_together(self, shape: Sequence[int]) -> int:
        return 1 if len(shape) > 1 else shape[0]


def block_of(name: str) -> tuple[int, int]:
    """Numbers and bytes of a block of that type."""
    return _SIZES[name]


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """A 16-bit number of each block, [blocks, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _fields(
    data: torch.Tensor, width: int, shifts: Sequence[int], mask: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Take fields out of each byte, [blocks, numbers]: of `width` bytes all first ones, then the next.

    One operation a shift, on whole bytes side by side, and straight into the dtype that is computed in: three times as fast as
    broadcasting the shifts.
    """
    grouped = data.contiguous().view(len(data), -1, width)
    fields = torch.empty(len(data), grouped.shape[1], len(shifts), width, dtype=dtype, device=data.device)
    for place, shift in enumerate(shifts):
        fields[:, :, place] = (grouped >> shift if shift else grouped) & mask
    return fields.view(len(data), -1)


def _nibbles(data: torch.Tensor, width: int) -> torch.Tensor:
    """[blocks, numbers]."""
    return _fields(data, width, (0, 4), 15)


def _scaled(levels: torch.Tensor, scales: torch.Tensor, least: torch.Tensor | None = None) -> torch.Tensor:
    """Levels [blocks, numbers], which are used up, times the scale of their group, [blocks, groups]; less its minimum."""
    grouped = levels.view(*scales.shape, -1).mul_(scales[:, :, None])
    return grouped if least is None else grouped.sub_(least[:, :, None])


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 2:], 16).sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 4:], 16).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _fifth_bits(data: torch.Tensor) -> torch.Tensor:
    """Thirty-two bits of four bytes, each as the sixteen that it stands for."""
    bits = torch.empty(len(data), 4, 8, device=data.device)
    for place in range(8):
        bits[:, :, place] = (data >> place) & 1
    return bits.view(len(data), 32).mul_(16)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 6:], 16).add_(_fifth_bits(blocks[:, 2:6])).sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    levels = _nibbles(blocks[:, 8:], 16).add_(_fifth_bits(blocks[:, 4:8]))
    return levels.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = blocks[:, :16] & 15, blocks[:, :16] >> 4
    levels = _fields(blocks[:, 16:80], 32, (0, 2, 4, 6), 3)
    return _scaled(levels, _half(blocks, 80) * scales.float(), _half(blocks, 82) * minima.float())


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    low, high = _fields(blocks[:, 96:104], 8, (0, 4), 15), _fields(blocks[:, 104:108], 4, (0, 2, 4, 6), 3)
    scales = low.add_(high.mul_(16)).sub_(32)
    # A bit that is not set takes four away.
    kept = _fields(blocks[:, :32], 32, range(8), 1)
    levels = _fields(blocks[:, 32:96], 32, (0, 2, 4, 6), 3).add_(kept.sub_(1).mul_(4))
    return _scaled(levels, _half(blocks, 108) * scales)


def _scales_and_minima(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of six bits each, out of twelve bytes."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([first & 63, (rest & 15) | ((first >> 2) & 48)], dim=1)
    minima = torch.cat([second & 63, (rest >> 4) | ((second >> 2) & 48)], dim=1)
    return scales.float(), minima.float()


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    return _scaled(_nibbles(blocks[:, 16:], 32), _half(blocks, 0) * scales, _half(blocks, 2) * minima)


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    levels = _nibbles(blocks[:, 48:], 32).add_(_fields(blocks[:, 16:48], 32, range(8), 1).mul_(16))
    return _scaled(levels, _half(blocks, 0) * scales, _half(blocks, 2) * minima)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    high = _fields(blocks[:, 128:192], 32, (0, 2, 4, 6), 3)
    levels = _nibbles(blocks[:, :128], 64).add_(high.mul_(16)).sub_(32)
    return _scaled(levels, _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float())


def _looked_up(data: torch.Tensor, levels: Sequence[int]) -> torch.Tensor:
    """What sixteen bytes' nibbles stand for, [blocks, numbers]."""
    nibbles = _fields(data, 16, (0, 4), 15, torch.int32)
    table = torch.tensor(levels, dtype=torch.float32, device=data.device)
    return table.index_select(0, nibbles.view(-1)).view(len(data), -1)


def _iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    return _looked_up(blocks[:, 2:], _IQ4_LEVELS).mul_(_half(blocks, 0))


def _iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    low, high = _fields(blocks[:, 4:8], 1, (0, 4), 15), _fields(blocks[:, 2:4], 1, (0, 2, 4, 6), 3)
    scales = low.add_(high.mul_(16)).sub_(32)
    return _scaled(_looked_up(blocks[:, 8:], _IQ4_LEVELS), _half(blocks, 0) * scales)


def _mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    exponents = blocks[:, :1].to(torch.int32)
    # Half of 2 ** (e - 127), subnormal where e is small.
    bits = torch.where(exponents < 2, 0x00200000 << exponents.clamp(max=1), (exponents - 1) << 23)
    return _looked_up(blocks[:, 1:], _FP4_LEVELS).mul_(bits.view(torch.float32))


_DECODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
"""What makes numbers, [blocks, numbers] or in groups, of blocks, [blocks, bytes]."""
