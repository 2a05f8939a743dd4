"""Weights of which each is stored in several tensors beside one another, which its module's path names."""

from collections.abc import Callable, Mapping

from offload.model.quantised.weights import StoredWeights
from offload.storage.blocks import FileRange, TensorSpec
from offload.storage.checkpoint import StoredTensor
from offload.storage.codecs.weights import Cast, EncodedTensor, WeightCodec
from offload.storage.errors import CorruptCheckpoint

Stored = Mapping[str, StoredTensor]
Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of the model's parameters, by name."""

Found = tuple[WeightCodec, tuple[FileRange, ...]]
Reader = Callable[[Stored, str, tuple[int, ...]], Found | None]
"""Given a module's path and its weight's shape, how that is stored; None if it is a tensor as it is."""


def collected(stored: Stored, dtype: str, shapes: Shapes, read: Reader) -> StoredWeights:
    """All parameters that the model has, each as `read` finds it, or as it is."""
    plain: dict[str, StoredTensor] = {}
    encoded: dict[str, EncodedTensor] = {}
    for name, shape in shapes.items():
        path, _, own = name.rpartition(".")
        found = read(stored, path, shape) if own == "weight" and len(shape) == 2 else None
        tensor = stored.get(name)
        if found is not None:
            encoded[name] = EncodedTensor(TensorSpec(name, dtype, shape), *found)
        elif tensor is None:
            continue
        elif tensor.spec.dtype == dtype:
            plain[name] = tensor
        else:
            encoded[name] = EncodedTensor(TensorSpec(name, dtype, tensor.spec.shape), Cast(tensor.spec.dtype), (tensor.range,))
    return StoredWeights(plain, encoded)


def check_fit(fits: bool, path: str, shape: tuple[int, ...], words: StoredTensor, scales: StoredTensor) -> None:
    if not fits:
        raise CorruptCheckpoint(
            f"{words.range.path}: {path}.weight is {list(shape)} in the model, and stored as {words.spec.dtype}"
            f"{list(words.spec.shape)} with scales {list(scales.spec.shape)}: they do not fit"
        )
