"""A layer computes a few sequences at a time: one pass of its weights serves the whole batch, in less memory.

FlexGen's schedule within a layer (arXiv 2303.06865, section 4.1), for any model: what belongs to sequences is cut along
the batch, the layer's own `forward` runs for each part, and the results and the KV cache are put together again.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Cache, EncoderDecoderCache

from offload.model.pytree import leaves, tensors

Forward = Callable[..., Any]

_MATRIX_POSITIONS = (3, 4)
"""The leading dimension of position ids and embeddings with one row for time, height and width (and text)."""


class CannotSplit(Exception):
    """The arguments or results of a layer do not tell which of their dimensions is the batch."""


class MicroBatches:
    """Takes calls of a layer apart.

    Args:
        size: sequences in one part; at least 2, because one sequence cannot be told from what is shared by all.
        decode_size: the same where each sequence has one token; 0 for all.
        refused: told why a call was computed as a whole.
    """

    def __init__(self, size: int, decode_size: int, refused: Callable[[str], None]) -> None:
        assert size >= 2
        self._size = size
        self._decode_size = decode_size
        self._refused = refused

    def wrap(self, forward: Forward) -> Forward:
        def called(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, torch.Tensor) or hidden.dim() < 2:
                return forward(*args, **kwargs)
            size = self._size if hidden.shape[1] > 1 else self._decode_size
            if not size or hidden.shape[0] <= size:
                return forward(*args, **kwargs)
            try:
                cut = _Cut(hidden.shape[0], hidden.shape[1])
                cut.check((args, kwargs))
            except CannotSplit as error:
                self._refused(f"a batch is computed as a whole, not {size} sequences at once: {error}")
                return forward(*args, **kwargs)
            return _in_parts(size, forward, cut, args, kwargs)

        return called


def _in_parts(size: int, forward: Forward, cut: "_Cut", args: Any, kwargs: Any) -> Any:
    results = []
    for begin in range(0, cut.batch_size, size):
        end = min(begin + size, cut.batch_size)
        part_args, part_kwargs = cut.part((args, kwargs), begin, end)
        results.append(forward(*part_args, **part_kwargs))
    cut.join_caches()
    return _joined(results, size)


class _Cut:
    """How the arguments of one call are cut.

    Args:
        batch_size: sequences.
        tokens: of each.
    """

    def __init__(self, batch_size: int, tokens: int) -> None:
        self.batch_size = batch_size
        self._tokens = tokens
        self._caches: dict[int, tuple[Cache, list[_CachePart]]] = {}

    def check(self, value: Any) -> None:
        """Raise NotInParts where it is not sure what belongs to single sequences."""
        for tensor in tensors(value):
            self._dimension(tensor)
        for item in leaves(value):
            if isinstance(item, Cache) and (isinstance(item, EncoderDecoderCache) or not hasattr(item, "layers")):
                raise CannotSplit(f"a {type(item).__name__} cannot be cut")

    def part(self, value: Any, begin: int, end: int) -> Any:
        if isinstance(value, torch.Tensor):
            dimension = self._dimension(value)
            return value if dimension is None else value.narrow(dimension, begin, end - begin)
        if isinstance(value, Cache):
            return self._cache_part(value, begin, end)
        if type(value) in (tuple, list):
            return type(value)(self.part(item, begin, end) for item in value)
        if type(value) is dict:
            return {name: self.part(item, begin, end) for name, item in value.items()}
        return value

    def join_caches(self) -> None:
        for cache, parts in self._caches.values():
            for index in sorted({index for part in parts for index in part.touched}):
                while len(cache.layers) <= index:
                    cache.layers.append(copy.copy(parts[0].touched[len(cache.layers)]))
                _join_layer(cache.layers[index], [part.touched[index] for part in parts], self.batch_size)

    def _dimension(self, tensor: torch.Tensor) -> int | None:
        """The batch's place in a tensor's shape; None for what all sequences share."""
        shape = tuple(tensor.shape)
        if self.batch_size not in shape or len(shape) < 2:
            return None
        if shape[0] == self.batch_size:
            if self._tokens == self.batch_size and shape[1] != self.batch_size:
                raise CannotSplit(f"there are as many tokens as sequences ({self.batch_size})")
            if shape[0] == shape[1] and shape[0] in _MATRIX_POSITIONS:
                raise CannotSplit(f"a tensor of shape {shape} has two dimensions that may be the batch")
            return 0
        if shape[0] in _MATRIX_POSITIONS and shape[1] == self.batch_size:
            return 1
        return None

    def _cache_part(self, cache: Cache, begin: int, end: int) -> Cache:
        _, parts = self._caches.setdefault(id(cache), (cache, []))
        layers = _CachePart(cache.layers, begin, end, self.batch_size)
        parts.append(layers)
        part = copy.copy(cache)
        part.layers = layers  # type: ignore[assignment]
        return part


class _CachePart:
    """The layers of a cache, each cut when it is looked at."""

    def __init__(self, layers: list[Any], begin: int, end: int, batch_size: int) -> None:
        self.touched: dict[int, Any] = {}
        self._layers = layers
        self._range = (begin, end, batch_size)
        self._added = 0

    def __len__(self) -> int:
        return len(self._layers) + self._added

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Any:
        if index < 0:
            index += len(self)
        if index >= len(self):
            raise IndexError(index)
        if index not in self.touched:
            self.touched[index] = _cut_layer(self._layers[index], *self._range)
        return self.touched[index]

    def append(self, layer: Any) -> None:
        self.touched[len(self)] = layer
        self._added += 1


def _cut_layer(layer: Any, begin: int, end: int, batch_size: int) -> Any:
    """A layer of a cache with the rows of some sequences; what it changes in place, it changes in the whole too."""
    part = copy.copy(layer)
    for name, value in vars(layer).items():
        if not isinstance(value, torch.Tensor):
            continue
        if value.dim() and value.shape[0] == batch_size:
            setattr(part, name, value[begin:end])
        else:
            # A counter, say: each part moves its own on.
            setattr(part, name, value.clone())
    return part


def _join_layer(layer: Any, parts: list[Any], batch_size: int) -> None:
    for name, value in list(vars(parts[0]).items()):
        before = getattr(layer, name, None)
        values = [getattr(part, name) for part in parts]
        if not isinstance(value, torch.Tensor):
            setattr(layer, name, batch_size if name == "batch_size" else values[-1])
        elif value.dim() < 2:
            if isinstance(before, torch.Tensor) and before.device == values[-1].device:
                # A counter: another object may hold it too.
                before.copy_(values[-1])
            else:
                setattr(layer, name, values[-1])
        elif not (isinstance(before, torch.Tensor) and _within(values, before)):
            setattr(layer, name, torch.cat(values, dim=0))


def _within(values: list[torch.Tensor], whole: torch.Tensor) -> bool:
    """True if the values are still rows of `whole`, which was changed in place if at all."""
    storage = whole.untyped_storage()._cdata
    return all(value.untyped_storage()._cdata == storage and value.shape[1:] == whole.shape[1:] for value in values)


def _joined(results: list[Any], size: int) -> Any:
    first = results[0]
    if isinstance(first, torch.Tensor):
        if first.dim() and first.shape[0] % size == 0:
            return torch.cat(results, dim=0)
        if first.dim() and first.shape[0] == 1:
            # Shared by all sequences, like a bias of relative positions.
            return first
        raise CannotSplit(f"a layer returned a tensor of shape {tuple(first.shape)} for {size} sequences")
    if type(first) in (tuple, list):
        return type(first)(_joined(list(items), size) for items in zip(*results, strict=True))
    return first
