"""Beginnings of prompts on disk, block by block: computed once, loaded by whoever begins alike.

A block is some tokens after a beginning; its name is a hash of everything that its keys and values depend on: the model, its
dtype and added weights, the code that computes, and all tokens up to its end. So the longest beginning that is there is found
by following the names. A prompt's blocks are computed one after another, each in a pass of its own: then what is loaded has
the very bits that computing it again would give.
"""

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from offload.kv.state_offload import onload_state
from offload.kv.transformers_cache import PagedCacheLayer
from offload.storage.block_file import BlockFile, BlockFileWriter, check_folder, key_of, path_of
from offload.storage.errors import CorruptCheckpoint, DiskFull, ReadError

BLOCK_TOKENS = 256

_KEY = "key"
_FORMAT = 1

Parts = dict[str, torch.Tensor]


class PrefixStore:
    """Blocks of keys and values in a folder.

    Args:
        folder: where; the blocks of several models may be there.
        facts: what keys and values depend on besides the tokens.
        tell: told a sentence of what is not used, and why.

    Raises:
        DiskFolderError: if the folder cannot be used.
    """

    def __init__(self, folder: str, facts: dict[str, Any], warn: Callable[[str], None]) -> None:
        check_folder(folder)
        self._folder = folder
        self._facts = facts | {"format": _FORMAT, "block_tokens": BLOCK_TOKENS}
        self._warn = warn

    def keys(self, tokens: Sequence[int]) -> list[str]:
        """The names of the blocks of a beginning."""
        names, before = [], key_of(self._facts)
        for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            before = key_of({"before": before, "tokens": list(tokens[start : start + BLOCK_TOKENS])})
            names.append(before)
        return names

    def nbytes(self, key: str) -> int | None:
        """What a block takes of the disk; None if it is not there."""
        try:
            return os.stat(path_of(self._folder, key)).st_size
        except OSError:
            return None

    def load(self, key: str) -> Parts | None:
        """A block's tensors; None if it is not there, or not whole, which is told, and the block is forgotten."""
        try:
            file = BlockFile.open(self._folder, key)
            if file is None:
                return None
            parts = {name: file.view(name).clone() for name in file.tensors}
            _check(parts, file, key)
        except (CorruptCheckpoint, ReadError, OSError, KeyError, TypeError, RuntimeError) as error:
            self._warn(f"a stored beginning of a prompt cannot be used and is computed again ({error})")
            _forget(self._folder, key)
            return None
        del parts[_KEY]
        return parts

    def save(self, key: str, parts: Parts) -> None:
        """Keep a block. A full disk is told, and nothing is kept then."""
        writer = BlockFileWriter(self._folder, key)
        try:
            writer.add(_KEY, _name_tensor(key))
            for name, part in parts.items():
                writer.add(name, part.cpu())
            writer.finish().close()
        except DiskFull as error:
            writer.abandon()
            self._warn(f"the beginning of the prompt is not kept: {error}")


def _check(parts: Parts, file: BlockFile, key: str) -> None:
    for name, part in parts.items():
        found = zlib.crc32(memoryview(part.contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        if found != file.tensors[name].range.crc32:
            raise CorruptCheckpoint(f"{file.path}: {name} fails its checksum")
    if not torch.equal(parts[_KEY], _name_tensor(key)):
        raise CorruptCheckpoint(f"{file.path} holds another beginning than its name says")


def _name_tensor(key: str) -> torch.Tensor:
    return torch.tensor(list(key.encode()), dtype=torch.uint8)


def _forget(folder: str, key: str) -> None:
    try:
        os.unlink(path_of(folder, key))
    except OSError:
        pass


# -- a cache's state, block by block


def block_of(cache: Any, start: int, end: int) -> Parts:
    """What positions `start` to `end` added to a cache of one sequence; of layers that do not keep all tokens, the state."""
    parts: Parts = {}
    for index, layer in enumerate(cache.layers):
        for name, value in _state_of(layer, start, end).items():
            parts[f"{index}.{name}"] = value
    return parts


def add_block(cache: Any, parts: Parts, device: torch.device) -> None:
    """Append a block to a cache of one sequence that ends where the block begins."""
    by_layer: dict[int, Parts] = {}
    for name, value in parts.items():
        index, _, rest = name.partition(".")
        by_layer.setdefault(int(index), {})[rest] = value.to(device)
    for place, state in by_layer.items():
        while len(cache.layers) <= place:
            cache.layers.append(cache.layer_class_to_replicate())
        layer = cache.layers[place]
        if _keeps_tokens(layer):
            layer.update(state["keys"], state["values"])
        else:
            _set_state(layer, state)


def _keeps_tokens(layer: Any) -> bool:
    return isinstance(layer, PagedCacheLayer) or type(layer) is DynamicLayer


def _state_of(layer: Any, start: int, end: int) -> Parts:
    if isinstance(layer, PagedCacheLayer):
        pair = layer.paged.part(start, end)
        return {"keys": pair.keys, "values": pair.values}
    if type(layer) is DynamicLayer:
        assert layer.keys is not None
        assert layer.values is not None
        return {"keys": layer.keys[:, :, start:end], "values": layer.values[:, :, start:end]}
    onload_state(layer)
    own = {name: value for name, value in vars(layer).items() if not name.startswith("_state_offloader")}
    return dict(_tensors(own, ""))


def _tensors(values: dict[Any, Any], before: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors and numbers of a layer of another kind, by path."""
    for name, value in values.items():
        path = f"{before}{type(name).__name__[0]}{name}"
        if isinstance(value, torch.Tensor):
            yield path, value
        elif isinstance(value, bool):
            yield f"{path}:bool", torch.tensor([int(value)])
        elif isinstance(value, int):
            yield f"{path}:int", torch.tensor([value])
        elif isinstance(value, dict):
            yield from _tensors(value, f"{path}/")


def _set_state(layer: Any, state: Parts) -> None:
    for path, value in state.items():
        *outer, last = path.split("/")
        target: Any = vars(layer)
        for name in outer:
            target = target[_name(name)]
        name, _, kind = last.partition(":")
        if kind:
            target[_name(name)] = bool(value.item()) if kind == "bool" else int(value.item())
        else:
            target[_name(name)] = value
    first = next((value for path, value in state.items() if ":" not in path and value.is_floating_point()), None)
    if first is not None:
        layer.dtype, layer.device = first.dtype, first.device


def _name(text: str) -> Any:
    return int(text[1:]) if text[0] == "i" else text[1:]
