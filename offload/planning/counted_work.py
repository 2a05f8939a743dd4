"""Keeps what dry runs counted: in this process, and in a file for the next one.

A dry run of a 24-layer model takes about half a second, and opening a session makes six of them. What they give depends on
the model's code and config and on the shapes asked for, and on nothing else.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

from offload.model.blocks import TakenApart
from offload.scheduler.work import ModuleWork, PassWork, Work
from offload.storage.cache_folder import cache_folder
from offload.storage.whole_file import keep_text

_FOLDER = "dry-runs"
_MOST_FILES = 64
_MOST_IN_MEMORY = 64
_VERSIONED = ("torch", "transformers", "offload")
"""Packages whose code changes with their version alone: of a class from elsewhere no file is kept."""

_SOURCES = (
    "planning/dry_run.py",
    "planning/operations.py",
    "planning/counted_work.py",
    "model/blocks.py",
    "model/micro_batch.py",
)
"""The code of this package that decides what is counted."""

Counted = TypeVar("Counted")
_in_memory: dict[Any, Any] = {}


class CountedWork:
    """What was counted of one model, by what was asked.

    Args:
        by_submodule: units that are taken apart.
        micro_batch: sequences that a layer computes at once; 0 for all.
    """

    def __init__(self, model: nn.Module, by_submodule: TakenApart, micro_batch: int) -> None:
        self._identity = _identity(model, by_submodule, micro_batch)
        self._file = None if self._identity is None else _file_of(model, self._identity)

    def get(self, name: str, shape: tuple[int, ...], count: Callable[[], Counted]) -> Counted:
        """The result of `count`, which is asked only once for one model, name and shape.

        Raises:
            DryRunFailed: as `count` does; a failure is not kept.
        """
        if self._identity is None:
            return count()
        key = (self._identity, name, shape)
        if key not in _in_memory:
            if len(_in_memory) >= _MOST_IN_MEMORY:
                _in_memory.pop(next(iter(_in_memory)))
            _in_memory[key] = self._from_file(f"{name} {shape}", count)
        return cast(Counted, _in_memory[key])

    def _from_file(self, key: str, count: Callable[[], Counted]) -> Counted:
        kept = _read(self._file)
        if key in kept:
            try:
                return cast(Counted, _decoded(kept[key]))
            except (AttributeError, TypeError, ValueError, KeyError):
                pass
        found = count()
        if self._file is not None:
            keep_text(self._file, json.dumps({**_read(self._file), key: _encoded(found)}), _MOST_FILES)
        return found


def _identity(model: nn.Module, by_submodule: TakenApart, micro_batch: int) -> tuple[Any, ...] | None:
    """Equal for models that compute the same: class, config, kinds and sizes of their modules; None without a config."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return None
    modules = tuple(type(module) for module in model.modules())
    shapes = tuple((value.shape, value.dtype) for value in model.parameters())
    return type(model), config.to_json_string(), config._attn_implementation, modules, shapes, by_submodule, micro_batch


def _file_of(model: nn.Module, identity: tuple[Any, ...]) -> Path | None:
    """Where it is kept for other processes; None where code takes part that no version number tells of."""
    if any("forward" in vars(module) for module in model.modules()):
        return None
    kinds = {type(module) for module in model.modules()}
    # Some libraries replace methods of transformers' classes.
    code = {kind.__module__ for kind in kinds} | {kind.forward.__module__ for kind in kinds}
    if any(module.partition(".")[0] not in _VERSIONED for module in code):
        return None
    _, config, attention, modules, shapes, by_submodule, micro_batch = identity
    facts = [
        [f"{kind.__module__}.{kind.__qualname__} {kind.forward.__module__}" for kind in modules],
        config,
        attention,
        [f"{tuple(shape)} {dtype}" for shape, dtype in shapes],
        [sorted(by_submodule.keys), sorted(by_submodule.whole)],
        micro_batch,
        [torch.__version__, transformers.__version__, _own_code()],
    ]
    return cache_folder() / _FOLDER / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.json"


@cache
def _own_code() -> str:
    root = Path(__file__).parent.parent
    return hashlib.sha256(b"".join((root / name).read_bytes() for name in _SOURCES)).hexdigest()


def _read(path: Path | None) -> dict[str, Any]:
    """What a file holds; nothing if there is none, or it was broken."""
    try:
        content = {} if path is None else json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _encoded(value: Any) -> Any:
    match value:
        case PassWork():
            return {"pass": asdict(value)}
        case tuple():
            return {"tuple": [_encoded(item) for item in value]}
        case frozenset():
            return {"names": sorted(value)}
    return {"value": value}


def _decoded(content: Any) -> Any:
    ((kind, value),) = content.items()
    match kind:
        case "pass":
            modules = tuple(
                ModuleWork(**{**module, "uses": tuple(module["uses"]), "work": _work(module["work"])})
                for module in value["modules"]
            )
            return PassWork(**{**value, "modules": modules, "between": _work(value["between"])})
        case "tuple":
            return tuple(_decoded(item) for item in value)
        case "names":
            return frozenset(value)
    return value


def _work(content: dict[str, Any]) -> Work:
    return Work(**{**content, "products": tuple((rows, flops) for rows, flops in content["products"])})
