"""How fast this machine's CPU decodes: measured on a small sample, once for each codec of a process."""

import time
from functools import lru_cache

import torch

from offload.storage.blocks import DTYPE_BYTES
from offload.storage.codecs.four_bits import FourBits
from offload.storage.codecs.ggml import GgmlBlocks, block_of
from offload.storage.codecs.packed_integers import PackedColumns, PackedRows
from offload.storage.codecs.scaled_numbers import ScaledNumbers
from offload.storage.codecs.weights import Cast, WeightCodec
from offload.storage.gguf_header import GGML_TYPES

_GGML = tuple(name for name, numbers, _ in GGML_TYPES.values() if numbers > 1)

CODECS = (*_GGML, "fp8", "int4", "int8", "gptq int4", "gptq int8", "awq int4", "nf4", "fp4")
"""Names of what can be timed, beside dtypes."""

_ROWS, _COLUMNS = 2048, 512
_ROUNDS = 6
_BYTE = 0x3C
"""Ordinary numbers in every format; zeros or what is next to them would take longer."""


@lru_cache
def decoded_bytes_per_second(name: str, dtype: str) -> float:
    """Bytes that come out, in a second.

    Args:
        name: of the codec.
        dtype: that is decoded to, torch's name.
    """
    codec, nbytes = _sample(name)
    parts = [torch.full((count,), _BYTE, dtype=torch.uint8) for count in nbytes]
    out = torch.empty(_ROWS, _COLUMNS, dtype=getattr(torch, dtype))
    best = float("inf")
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        codec.decode(parts, out)
        best = min(best, time.perf_counter() - begun)
    return out.nbytes / best


def _sample(name: str) -> tuple[WeightCodec, list[int]]:
    """A codec of that name for a small matrix, and the bytes of its parts."""
    numbers = _ROWS * _COLUMNS
    if name == "fp8":
        return ScaledNumbers("float8_e4m3fn", "float32", (4, 4)), [numbers, 64]
    if name in ("nf4", "fp4"):
        return FourBits(name, 64), [numbers // 2, numbers // 64 * 4, 64]
    if name.startswith(("gptq", "awq")):
        bits = int(name[-1])
        columns = PackedColumns(bits, "float16", 4, 0, name.startswith("awq"))
        return columns, [numbers * bits // 8, 4 * _ROWS * bits // 8, 4 * _ROWS * 2]
    if name in ("int4", "int8"):
        bits = int(name[3:])
        return PackedRows(bits, "float32", 8, zeros=False), [numbers * bits // 8, _ROWS * 8 * 4]
    if name in DTYPE_BYTES:
        return Cast(name), [numbers * DTYPE_BYTES[name]]
    size, nbytes = block_of(name)
    return GgmlBlocks(name), [numbers // size * nbytes]
