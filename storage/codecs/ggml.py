"""The block types of GGUF files, as ggml defines them: some numbers that share a scale, or a few.

Each decoder computes in the order of ggml's reference (`dequantize_row_*` in ggml-quants.c), in fp32, so that the values are
those of `gguf.quants.dequantize`, bit by bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from offload.storage.gguf_header import GGML_TYPES

_SIZES = {name: (numbers, nbytes) for name, numbers, nbytes in GGML_TYPES.values()}

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
        numbers, nbytes = _SIZES[self.name]
        out.view(-1, numbers).copy_(_DECODERS[self.name](parts[0].view(-1, nbytes)).view(-1, numbers))

    def rows_together(self, shape: Sequence[int]) -> int:
        return 1 if len(shape) > 1 else shape[0]


def block_of(name: str) -> tuple[int, int]:
    """Numbers and bytes of a block of that type."""
    return _SIZES[name]


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """A 16-bit number of each block, [blocks, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _fields(data: torch.Tensor, width: int, shifts: Sequence[int]) -> torch.Tensor:
    """Take fields out of each byte, [blocks, bytes / width, shifts, width]: of `width` bytes all first ones, then the next."""
    amounts = torch.tensor(shifts, dtype=torch.uint8, device=data.device).view(1, 1, -1, 1)
    return data.reshape(len(data), -1, 1, width) >> amounts


def _nibbles(data: torch.Tensor, width: int) -> torch.Tensor:
    """[blocks, numbers]."""
    return (_fields(data, width, (0, 4)) & 15).reshape(len(data), -1)


def _scaled(levels: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Levels [blocks, numbers] times the scale of their group, [blocks, groups]."""
    return scales[:, :, None] * levels.reshape(*scales.shape, -1).float()


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:], 16).to(torch.int8) - 8).float()


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:], 16).float() + _half(blocks, 2)


def _fifth_bits(data: torch.Tensor) -> torch.Tensor:
    """Thirty-two bits of four bytes, each in the place of a nibble's fifth."""
    return ((data[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=data.device)) & 1).reshape(len(data), -1) << 4


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    levels = (_nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])).to(torch.int8) - 16
    return _half(blocks, 0) * levels.float()


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    levels = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * levels.float() + _half(blocks, 2)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = blocks[:, :16] & 15, blocks[:, :16] >> 4
    levels = _fields(blocks[:, 16:80], 32, (0, 2, 4, 6)) & 3
    least = _half(blocks, 82) * minima.float()
    return _scaled(levels, _half(blocks, 80) * scales.float()) - least[:, :, None]


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    low = _fields(blocks[:, 96:104], 8, (0, 4)).reshape(-1, 16) & 15
    high = _fields(blocks[:, 104:108], 4, (0, 2, 4, 6)).reshape(-1, 16) & 3
    scales = (low | (high << 4)).to(torch.int8) - 32
    levels = (_fields(blocks[:, 32:96], 32, (0, 2, 4, 6)) & 3).reshape(-1, 256).to(torch.int8)
    # A bit that is not set takes four away.
    unset = (_fields(blocks[:, :32], 32, range(8)) & 1).reshape(-1, 256) ^ 1
    return _scaled(levels - (unset << 2).to(torch.int8), _half(blocks, 108) * scales.float())


def _scales_and_minima(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of six bits each, out of twelve bytes."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([first & 63, (rest & 15) | ((first >> 2) & 48)], dim=1)
    minima = torch.cat([second & 63, (rest >> 4) | ((second >> 2) & 48)], dim=1)
    return scales.float(), minima.float()


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    least = _half(blocks, 2) * minima
    return _scaled(_nibbles(blocks[:, 16:], 32), _half(blocks, 0) * scales) - least[:, :, None]


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    fifth = (_fields(blocks[:, 16:48], 32, range(8)) & 1).reshape(-1, 256) << 4
    least = _half(blocks, 2) * minima
    return _scaled(_nibbles(blocks[:, 48:], 32) | fifth, _half(blocks, 0) * scales) - least[:, :, None]


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    low, high = _nibbles(blocks[:, :128], 64), (_fields(blocks[:, 128:192], 32, (0, 2, 4, 6)) & 3).reshape(-1, 256)
    levels = (low | (high << 4)).to(torch.int8) - 32
    return _scaled(levels, _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float())


def _levels(nibbles: torch.Tensor, levels: Sequence[int]) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.float32, device=nibbles.device)[nibbles.long()]


def _iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * _levels(_nibbles(blocks[:, 2:], 16), _IQ4_LEVELS)


def _iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    low = (_fields(blocks[:, 4:8], 1, (0, 4)) & 15).reshape(-1, 8)
    high = (_fields(blocks[:, 2:4], 1, (0, 2, 4, 6)) & 3).reshape(-1, 8)
    scales = (low | (high << 4)).to(torch.int8) - 32
    return _scaled(_levels(_nibbles(blocks[:, 8:], 16), _IQ4_LEVELS), _half(blocks, 0) * scales.float())


def _mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    exponents = blocks[:, :1].to(torch.int32)
    # Half of 2 ** (e - 127), subnormal where e is small.
    bits = torch.where(exponents < 2, 0x00200000 << exponents.clamp(max=1), (exponents - 1) << 23)
    return bits.view(torch.float32) * _levels(_nibbles(blocks[:, 1:], 16), _FP4_LEVELS)


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
