"""Checkpoints of bitsandbytes: four bits (NF4, FP4; scales of their own scales or not), or eight with a scale a row."""

import json
from collections.abc import Mapping
from math import prod
from typing import Any

from offload.model.quantised.parts import Found, Shapes, Stored, check_fit, collected
from offload.model.quantised.weights import StoredWeights
from offload.storage.checkpoint import StoredTensor
from offload.storage.codecs.four_bits import FourBits
from offload.storage.codecs.scaled_numbers import RowMaxima
from offload.storage.errors import CorruptCheckpoint, UnsupportedCheckpoint

_STATE = "weight.quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_MOST_STATE_BYTES = 1 << 16


def bitsandbytes_weights(stored: Stored, method: Mapping[str, Any], dtype: str, shapes: Shapes) -> StoredWeights:
    """Read what `save_pretrained` wrote of a model that was loaded in four or eight bits.

    Raises:
        UnsupportedCheckpoint: for numbers of another kind; CorruptCheckpoint: for parts that do not fit one another.
    """

    def read(stored: Stored, path: str, shape: tuple[int, ...]) -> Found | None:
        weight = stored.get(f"{path}.weight")
        if weight is None:
            return None
        if (maxima := stored.get(f"{path}.SCB")) is not None:
            fits = weight.spec.dtype == "int8" and weight.spec.shape == shape and maxima.spec.dtype == "float32"
            check_fit(fits and prod(maxima.spec.shape) == shape[0], path, shape, weight, maxima)
            return RowMaxima(), (weight.range, maxima.range)
        state = next((item for name, item in stored.items() if name.startswith(f"{path}.{_STATE}")), None)
        return None if state is None else _four_bits(stored, path, shape, weight, state)

    return collected(stored, dtype, shapes, read)


def _four_bits(stored: Stored, path: str, shape: tuple[int, ...], weight: StoredTensor, state: StoredTensor) -> Found:
    said = _said(state)
    kind, block, nested = said.get("quant_type"), said.get("blocksize"), said.get("nested_blocksize", 0)
    if kind not in _KINDS or state.spec.name != f"{path}.{_STATE}{kind}":
        raise UnsupportedCheckpoint(f"{path} is of kind {kind!r} of bitsandbytes: {', '.join(_KINDS)} are read")
    names = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if nested else [])]
    parts = [stored.get(f"{path}.weight.{name}") for name in names]
    found = [part for part in parts if part is not None]
    if len(found) < len(names) or not all(isinstance(size, int) and size >= 0 for size in (block, nested)) or not block:
        raise CorruptCheckpoint(f"{weight.range.path}: of {path}.weight, {', '.join(names)} and the sizes of blocks are needed")
    numbers = prod(shape)
    scales = -(-numbers // block)
    wanted = [("uint8" if nested else "float32", scales), ("float32", 16), ("float32", -(-scales // (nested or 1)))]
    wanted.append(("float32", 256))
    fits = [(part.spec.dtype, prod(part.spec.shape)) for part in found] == wanted[: len(found)]
    fits = fits and list(said.get("shape", ())) == list(shape) and block % 2 == 0
    check_fit(fits and weight.range.nbytes == -(-numbers // 2), path, shape, weight, found[0])
    codec = FourBits(kind, block, nested, float(said.get("nested_offset", 0.0)) if nested else 0.0)
    return codec, tuple(part.range for part in (weight, *found))


def _said(state: StoredTensor) -> dict[str, Any]:
    """The JSON that lies in a tensor of bytes."""
    place = state.range
    try:
        if place.nbytes > _MOST_STATE_BYTES:
            raise ValueError(f"{place.nbytes:,} bytes")
        with open(place.path, "rb") as file:
            file.seek(place.offset)
            said = json.loads(file.read(place.nbytes))
        if not isinstance(said, dict):
            raise ValueError(f"{type(said).__name__}")
    except ValueError as error:
        raise CorruptCheckpoint(f"{place.path}: {state.spec.name} is no JSON object ({error})") from error
    return said
