"""Calls of the compiled decoders. Each says whether it decoded: it does not where nothing is built, or not for such tensors."""

import ctypes
from collections.abc import Sequence

import torch

from offload.storage.native.library import library

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_LEAST_BYTES = 3 << 19
"""Less than this is decoded by one thread as soon as by several, which have to begin first."""

_NUMBERS = {"float8_e4m3fn": 0, "float8_e5m2": 1, "int8": 2}


def decode_ggml(kind: int, blocks: torch.Tensor, rows: int, row_blocks: int, out: torch.Tensor, head_rows: int = 0) -> bool:
    """Decode blocks of one of ggml's types.

    Args:
        kind: ggml's number of the type.
        blocks: uint8, one-dimensional.
        head_rows: rows of a head, whose halves took turns and are put one after the other; 0 where there are no such.
    """
    return _call("offload_ggml", kind, [blocks], [rows, row_blocks, head_rows], out)


def decode_tiles(
    kind: str,
    numbers: torch.Tensor,
    scales: torch.Tensor,
    grid: tuple[int, int],
    out: torch.Tensor,
    factor: float = 1.0,
) -> bool:
    """Decode 8-bit numbers, each times the scale of its tile.

    Args:
        kind: of the numbers, torch's name.
        scales: fp32, of the grid.
        factor: of all, after the scale.
    """
    if kind not in _NUMBERS:
        return False
    rows, columns = out.shape
    sizes: list[_Argument] = [rows, columns, scales, factor, rows // grid[0], columns // grid[1]]
    return _call("offload_tiles", _NUMBERS[kind], [numbers], sizes, out)


def decode_four_bits(data: torch.Tensor, block: int, scales: torch.Tensor, numbers: torch.Tensor, out: torch.Tensor) -> bool:
    """Decode four bits, the first number in the high ones.

    Args:
        block: numbers that share a scale; even.
        scales: fp32, of each block.
        numbers: fp32, the sixteen that four bits stand for.
    """
    return _call("offload_four_bits", 4, [data], [out.numel(), block, scales, numbers], out)


def decode_packed_rows(
    bits: int, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, out: torch.Tensor
) -> bool:
    """Decode integers in words along the rows.

    Args:
        words: int32 [rows, words].
        scales: floats [rows, groups], or [1, groups] for all rows.
        zeros: fp32 [rows, groups]; None where half of the range stands for zero.
    """
    if scales.dtype not in _DTYPES:
        return False
    rows, columns = out.shape
    kinds: list[_Argument] = [scales, _DTYPES[scales.dtype], int(len(scales) == 1), zeros, scales.shape[1]]
    return _call("offload_packed_rows", bits, [words], [rows, columns, words.shape[1] * 4, *kinds], out)


def decode_packed_columns(
    layout: int, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group_of: torch.Tensor, out: torch.Tensor
) -> bool:
    """Decode integers in words whose rows are inputs.

    Args:
        layout: 4 or 8 bits of GPTQ, or 0 for AWQ.
        scales, zeros: fp32 [groups, outputs].
        group_of: int32 [inputs].
    """
    return _call("offload_packed_columns", layout, [words], [*out.shape, scales, zeros, group_of], out)


_Argument = int | float | torch.Tensor | None


def _call(name: str, kind: int, data: Sequence[torch.Tensor], rest: Sequence[_Argument], out: torch.Tensor) -> bool:
    known = library()
    tensors = [out, *data, *(item for item in rest if isinstance(item, torch.Tensor))]
    if known is None or out.dtype not in _DTYPES:
        return False
    if not all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors):
        return False
    given = [_as_c(item) for item in rest]
    pointers = [ctypes.c_void_p(item.data_ptr()) for item in data]
    threads = torch.get_num_threads() if out.nbytes >= _LEAST_BYTES else 1
    status: int = known[name](
        ctypes.c_int(kind),
        *pointers,
        *given,
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int(_DTYPES[out.dtype]),
        ctypes.c_int(threads),
    )
    return status == 0


def _as_c(item: _Argument) -> ctypes.c_void_p | ctypes.c_float | ctypes.c_int64:
    if item is None or isinstance(item, torch.Tensor):
        return ctypes.c_void_p(None if item is None else item.data_ptr())
    return ctypes.c_float(item) if isinstance(item, float) else ctypes.c_int64(item)
