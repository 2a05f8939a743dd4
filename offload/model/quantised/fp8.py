"""Checkpoints with 8-bit floats (`quant_method` fp8): a weight, and beside it the tensor of its scales."""

from collections.abc import Mapping
from typing import Any

from offload.model.quantised.weights import StoredWeights
from offload.storage.blocks import TensorSpec
from offload.storage.checkpoint import StoredTensor
from offload.storage.codecs.scaled_numbers import ScaledNumbers
from offload.storage.codecs.weights import Cast, EncodedTensor
from offload.storage.errors import CorruptCheckpoint

_SCALES = "_scale_inv"
_BESIDE = (_SCALES, ".activation_scale", "input_scale")
"""Tensors that belong to another, or to products in 8 bits, which are not computed here."""

_FLOATS = ("float8_e4m3fn", "float8_e5m2")
_SCALE_DTYPES = ("float32", "bfloat16", "float16", "uint8")


def fp8_weights(
    stored: Mapping[str, StoredTensor], method: Mapping[str, Any], dtype: str, shapes: Mapping[str, tuple[int, ...]]
) -> StoredWeights:
    """Pair weights with their scales.

    Args:
        stored: the tensors of the files, by name.
        method: what the config says of it.
        dtype: that they are decoded to, torch's name.
        shapes: of the model's parameters, by name.

    Raises:
        CorruptCheckpoint: if scales do not fit their weight, or are missing.
    """
    plain: dict[str, StoredTensor] = {}
    encoded: dict[str, EncodedTensor] = {}
    for name, tensor in stored.items():
        if name.endswith(_BESIDE):
            continue
        kind = tensor.spec.dtype
        spec = TensorSpec(name, dtype, tensor.spec.shape)
        if kind in _FLOATS:
            scales = stored.get(f"{name}{_SCALES}")
            if scales is None:
                raise CorruptCheckpoint(f"{tensor.range.path}: {name} is {kind}, and {name}{_SCALES} is not there")
            encoded[name] = EncodedTensor(spec, _codec(tensor, scales), (tensor.range, scales.range))
        elif kind == dtype or not kind.startswith(("float", "bfloat")):
            plain[name] = tensor
        else:
            encoded[name] = EncodedTensor(spec, Cast(kind), (tensor.range,))
    return StoredWeights(plain, encoded)


def _codec(weight: StoredTensor, scales: StoredTensor) -> ScaledNumbers:
    shape, found = weight.spec.shape, scales.spec.shape
    grid = (1, 1) if len(found) < 2 else found
    fits = len(shape) == 2 and len(grid) == 2 and all(grid) and not shape[0] % grid[0] and not shape[1] % grid[1]
    if not fits or scales.spec.dtype not in _SCALE_DTYPES:
        raise CorruptCheckpoint(
            f"{weight.range.path}: {weight.spec.name} is {list(shape)}, and its scales are {scales.spec.dtype}{list(found)}: "
            "they do not divide it into equal tiles"
        )
    return ScaledNumbers(weight.spec.dtype, scales.spec.dtype, (grid[0], grid[1]))
