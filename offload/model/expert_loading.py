"""Single experts out of checkpoints that keep each in tensors of its own, by the model's own converters.

A converter is run on one expert's tensors alone. Where that only puts bytes one after another, nothing is converted at
all: the pieces are read from the checkpoint to where they belong. Where it computes, the experts are written to a block
file, one by one. All experts of a layer are never in memory together.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from offload.model.experts import ExpertPieces
from offload.model.homes import FileMaps
from offload.model.placeholders import placeholder
from offload.storage.block_file import BlockFileWriter
from offload.storage.blocks import FileRange

_MOST_PIECES = 8
"""Pieces of one expert's part of a parameter: with more, its bytes are scattered, and it is converted."""

_Run = tuple[int, int, int]
"""Bytes of one source tensor: which, from where, how many."""

_ByteRuns = dict[str, list[_Run]]
"""The runs of each parameter, in the order in which they follow one another."""

Convert = Callable[[Any], dict[str, Any]]
"""Runs a converter on what it collected."""


class SingleExperts:
    """Takes converters apart into experts, for one checkpoint.

    Args:
        shapes: of the parameters that hold experts, by path in the model.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.pieces: dict[str, ExpertPieces] = {}
        """Where parameters lie that are read from the checkpoint as it is."""
        self._shapes = shapes
        self._maps = FileMaps()
        self._recipes: dict[Any, list[list[_Run]] | None] = {}

    def takes(self, layer_name: str, mapping: Any) -> bool:
        """True if the converter makes parameters of experts out of tensors that each belong to one expert."""
        count = self._count(layer_name)
        return count is not None and self._kind(mapping, count) is not None

    def locate(self, layer_name: str, mapping: Any, convert: Convert) -> dict[str, torch.Tensor] | None:
        """Note where the experts' bytes lie; stand-ins for the parameters, by name. None if they must be computed."""
        count = self._count(layer_name)
        assert count is not None
        first = self._sources(mapping, count, 0)
        recipe = self._byte_runs(mapping, first, convert)
        if recipe is None:
            return None
        found: dict[str, list[list[FileRange]]] = {name: [] for name in recipe}
        for expert in range(count):
            sources = [item for items in self._sources(mapping, count, expert).values() for item in items]
            ranges = [self._range(source) for source in sources]
            for name, runs in recipe.items():
                if any(ranges[source] is None for source, _, _ in runs):
                    return None
                found[name].append([_part(ranges[source], start, nbytes) for source, start, nbytes in runs])
        mapping.collected_tensors.clear()
        self.pieces.update(found)
        return {name: placeholder(self._shapes[name], _dtype_of(first)) for name in recipe}

    def write(self, layer_name: str, mapping: Any, convert: Convert, writer: BlockFileWriter) -> dict[str, torch.Tensor]:
        """Convert one expert after another into a block file; stand-ins for the parameters, by name."""
        count = self._count(layer_name)
        assert count is not None
        sources = dict(mapping.collected_tensors)

        def converted(expert: int) -> dict[str, torch.Tensor]:
            return self._converted(mapping, self._taken(sources, count, expert), convert)

        first = converted(0)
        names = list(first)
        for name in names:
            if tuple(first[name].shape) != (1, *self._shapes[name][1:]):
                raise ValueError(f"{name} has experts of shape {list(first[name].shape)}, not {list(self._shapes[name][1:])}")
            # One parameter at a time, since its experts lie together in the file.
            parts = (converted(expert)[name] if expert else first[name] for expert in range(count))
            writer.add_parts(name, first[name].dtype, self._shapes[name], parts, layer_name)
        mapping.collected_tensors.clear()
        return {name: placeholder(self._shapes[name], first[name].dtype) for name in names}

    def _count(self, layer_name: str) -> int | None:
        shape = self._shapes.get(layer_name)
        return None if shape is None else shape[0]

    def _kind(self, mapping: Any, count: int) -> str | None:
        lengths = {len(items) for items in mapping.collected_tensors.values()}
        if lengths == {count} and count > 1:
            return "apart"
        if lengths == {1}:
            firsts = (items[0] for items in mapping.collected_tensors.values())
            if all((tensor := _tensor(item)).dim() and tensor.shape[0] == count for item in firsts):
                return "together"
        return None

    def _sources(self, mapping: Any, count: int, expert: int) -> dict[str, list[torch.Tensor]]:
        return self._taken(dict(mapping.collected_tensors), count, expert)

    def _taken(self, collected: dict[str, list[Any]], count: int, expert: int) -> dict[str, list[torch.Tensor]]:
        """One expert's tensors, by source pattern."""
        return {
            pattern: [_tensor(items[expert])] if len(items) == count > 1 else [_tensor(items[0])[expert : expert + 1]]
            for pattern, items in collected.items()
        }

    def _converted(self, mapping: Any, tensors: dict[str, list[torch.Tensor]], convert: Convert) -> dict[str, torch.Tensor]:
        kept = mapping.collected_tensors
        mapping.collected_tensors = defaultdict(list, {pattern: list(items) for pattern, items in tensors.items()})
        try:
            results = convert(mapping)
        finally:
            mapping.collected_tensors = kept
        return {name: value[0] if isinstance(value, list) else value for name, value in results.items()}

    def _byte_runs(self, mapping: Any, sources: dict[str, list[torch.Tensor]], convert: Convert) -> _ByteRuns | None:
        """Find the runs of bytes of one expert, for each parameter. None if it is not so simple.

        Found by converting numbers that tell where they come from; layers that are alike share it.
        """
        key = type(mapping), tuple(mapping.source_patterns), tuple(items[0].shape for items in sources.values())
        try:
            without_values = {pattern: [item.to("meta") for item in items] for pattern, items in sources.items()}
            names = list(self._converted(mapping, without_values, convert))
            if key not in self._recipes:
                self._recipes[key] = self._traced(mapping, sources, convert)
        except Exception:  # whatever an operation makes of integers: it computes, then
            self._recipes[key] = None
        known = self._recipes[key]
        return None if known is None else dict(zip(names, known, strict=True))

    def _traced(self, mapping: Any, sources: dict[str, list[torch.Tensor]], convert: Convert) -> list[list[_Run]] | None:
        tensors = [item for items in sources.values() for item in items]
        starts = [0]
        for tensor in tensors:
            # A gap, so that runs of two sources never join.
            starts.append(starts[-1] + tensor.numel() + 1)
        numbers = iter(
            torch.arange(start, start + tensor.numel()).view(tensor.shape)
            for start, tensor in zip(starts, tensors, strict=False)
        )
        numbered = {pattern: [next(numbers) for _ in items] for pattern, items in sources.items()}
        size = tensors[0].element_size()
        recipe = []
        for name, result in self._converted(mapping, numbered, convert).items():
            if tuple(result.shape) != (1, *self._shapes[name][1:]):
                return None
            flat = result.reshape(-1)
            breaks = [0, *(torch.nonzero(flat[1:] - flat[:-1] != 1).reshape(-1) + 1).tolist(), flat.numel()]
            if len(breaks) - 1 > _MOST_PIECES:
                return None
            recipe.append([_run(starts, int(flat[a]), b - a, size) for a, b in zip(breaks, breaks[1:], strict=False)])
        return recipe

    def _range(self, tensor: torch.Tensor) -> FileRange | None:
        found = self._maps.locate(tensor)
        if found is None:
            # Another shard was opened since, or it is converted.
            self._maps = FileMaps()
            found = self._maps.locate(tensor)
        return found


def _tensor(item: Any) -> torch.Tensor:
    """What a converter collected: a tensor, a future of one, or a call that makes it."""
    if isinstance(item, torch.Tensor):
        return item
    made: torch.Tensor = item() if callable(item) else item.result()
    return made


def _run(starts: list[int], first: int, count: int, size: int) -> _Run:
    source = max(index for index, start in enumerate(starts) if start <= first)
    return source, (first - starts[source]) * size, count * size


def _part(whole: FileRange | None, start: int, nbytes: int) -> FileRange:
    assert whole is not None
    return FileRange(whole.path, whole.offset + start, nbytes)


def _dtype_of(sources: dict[str, list[torch.Tensor]]) -> torch.dtype:
    return next(iter(sources.values()))[0].dtype
