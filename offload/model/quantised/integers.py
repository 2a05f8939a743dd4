"""Checkpoints of compressed-tensors, GPTQ and AWQ: a weight in words of 32 bits, and beside it scales and zero points."""

from collections.abc import Mapping
from math import prod
from typing import Any

from offload.model.quantised.parts import Found, Shapes, Stored, check_fit, collected
from offload.model.quantised.weights import StoredWeights
from offload.storage.checkpoint import StoredTensor
from offload.storage.codecs.packed_integers import PackedColumns, PackedRows
from offload.storage.codecs.scaled_numbers import ScaledNumbers
from offload.storage.errors import CorruptCheckpoint, UnsupportedCheckpoint

_COMPRESSED = ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized")
_GPTQ = ("gptq", "gptq_v2")
_SCALES = ("float32", "bfloat16", "float16")


def compressed_tensors_weights(stored: Stored, method: Mapping[str, Any], dtype: str, shapes: Shapes) -> StoredWeights:
    """Read `pack-quantized`, and `float-`, `int-` and `naive-quantized` checkpoints.

    Raises:
        UnsupportedCheckpoint: for another way of compressing; CorruptCheckpoint: for parts that do not fit one another.
    """
    if (form := method.get("format")) not in _COMPRESSED:
        raise UnsupportedCheckpoint(f"compressed-tensors in the format {form}: {', '.join(_COMPRESSED)} are read")
    schemes = [group.get("weights") for group in (method.get("config_groups") or {}).values()]
    bits = {scheme["num_bits"] for scheme in schemes if scheme}
    if len(bits) != 1 or not bits <= {4, 8}:
        raise UnsupportedCheckpoint(f"compressed-tensors with weights of {sorted(bits)} bits: 4 or 8 for all of them are read")
    (count,) = bits

    def read(stored: Stored, path: str, shape: tuple[int, ...]) -> Found | None:
        scales = stored.get(f"{path}.weight_scale")
        if (packed := stored.get(f"{path}.weight_packed")) is not None:
            if f"{path}.weight_g_idx" in stored:
                raise UnsupportedCheckpoint(f"{path} was quantised in an order of its own (actorder), which is not read")
            scales = _there(scales, f"{path}.weight_scale")
            zeros = stored.get(f"{path}.weight_zero_point")
            groups = scales.spec.shape[-1] if len(scales.spec.shape) > 1 and scales.spec.shape[0] == shape[0] else 0
            words = -(-shape[1] * count // 32)
            fits = (
                packed.spec.dtype == "int32"
                and packed.spec.shape == (shape[0], words)
                and (not groups or not shape[1] % groups)
            )
            check_fit(fits and (zeros is None or groups > 0), path, shape, packed, scales)
            parts = [packed, scales, *([] if zeros is None else [zeros])]
            codec = PackedRows(count, _scales(scales), groups, zeros is not None)
            return codec, tuple(part.range for part in parts)
        weight = stored.get(f"{path}.weight")
        if weight is None or scales is None:
            return None
        found = scales.spec.shape
        grid = (found[0], found[1]) if len(found) == 2 else (1, 1) if prod(found) == 1 else (found[0], 1)
        check_fit(weight.spec.shape == shape and not shape[0] % grid[0] and not shape[1] % grid[1], path, shape, weight, scales)
        return ScaledNumbers(weight.spec.dtype, _scales(scales), grid), (weight.range, scales.range)

    return collected(stored, dtype, shapes, read)


def gptq_weights(stored: Stored, method: Mapping[str, Any], dtype: str, shapes: Shapes) -> StoredWeights:
    """Read GPTQ of four or eight bits, in its first format or the second, with `desc_act` or without.

    Raises:
        UnsupportedCheckpoint, CorruptCheckpoint: as above.
    """
    bits = method.get("bits")
    if bits not in (4, 8):
        raise UnsupportedCheckpoint(f"GPTQ with {bits} bits: 4 or 8 are read")
    if (form := method.get("checkpoint_format") or "gptq") not in _GPTQ or method.get("is_marlin_format"):
        raise UnsupportedCheckpoint(f"GPTQ in the format {form}: {', '.join(_GPTQ)} are read")
    added = 0 if form == "gptq_v2" else 1

    def read(stored: Stored, path: str, shape: tuple[int, ...]) -> Found | None:
        if (words := stored.get(f"{path}.qweight")) is None:
            return None
        zeros, scales = (_there(stored.get(f"{path}.{name}"), f"{path}.{name}") for name in ("qzeros", "scales"))
        index = stored.get(f"{path}.g_idx")
        groups = scales.spec.shape[0]
        fits = words.spec.shape == (shape[1] * bits // 32, shape[0]) and scales.spec.shape == (groups, shape[0])
        fits = fits and zeros.spec.shape == (groups, shape[0] * bits // 32) and not shape[1] % groups
        check_fit(fits and (index is None or index.spec.shape == (shape[1],)), path, shape, words, scales)
        parts = [words, zeros, scales, *([] if index is None else [index])]
        return PackedColumns(bits, _scales(scales), groups, added, False), tuple(part.range for part in parts)

    return collected(stored, dtype, shapes, read)


def awq_weights(stored: Stored, method: Mapping[str, Any], dtype: str, shapes: Shapes) -> StoredWeights:
    """Read AWQ of four bits, in the layout of its `gemm` kernels.

    Raises:
        UnsupportedCheckpoint, CorruptCheckpoint: as above.
    """
    bits, version = method.get("bits", method.get("w_bit")), str(method.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise UnsupportedCheckpoint(f"AWQ with {bits} bits in the layout {version}: 4 bits in the layout gemm are read")

    def read(stored: Stored, path: str, shape: tuple[int, ...]) -> Found | None:
        if (words := stored.get(f"{path}.qweight")) is None:
            return None
        zeros, scales = (_there(stored.get(f"{path}.{name}"), f"{path}.{name}") for name in ("qzeros", "scales"))
        groups = scales.spec.shape[0]
        fits = words.spec.shape == (shape[1], shape[0] // 8) and scales.spec.shape == (groups, shape[0])
        check_fit(fits and zeros.spec.shape == (groups, shape[0] // 8) and not shape[1] % groups, path, shape, words, scales)
        return PackedColumns(4, _scales(scales), groups, 0, True), (words.range, zeros.range, scales.range)

    return collected(stored, dtype, shapes, read)


def _there(tensor: StoredTensor | None, name: str) -> StoredTensor:
    if tensor is None:
        raise CorruptCheckpoint(f"{name} is not in the checkpoint, and the weight beside it cannot be decoded without it")
    return tensor


def _scales(tensor: StoredTensor) -> str:
    if tensor.spec.dtype not in _SCALES:
        raise UnsupportedCheckpoint(f"{tensor.spec.name} is {tensor.spec.dtype}; scales are read in {', '.join(_SCALES)}")
    return tensor.spec.dtype
