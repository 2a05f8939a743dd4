"""The values of a foreign adapter_config.json: whether each is of the type that peft declares, which peft does not look at.

A number in place of a list of tokens would be found out when the first prompt is computed, deep inside of peft.
"""

import json
import types
import typing
from pathlib import Path
from typing import Any

from offload.storage.errors import ConfigError, foreign_file

_PLAIN = (bool, int, float, str, list, dict, tuple)


def check_types(folder: str) -> None:
    """Raise ConfigError for a value of another type than peft's config class declares."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    path = Path(folder, "adapter_config.json")
    with foreign_file(f"the adapter {folder} cannot be used", ConfigError):
        content = json.loads(path.read_text())
        declared = typing.get_type_hints(PEFT_TYPE_TO_CONFIG_MAPPING[content["peft_type"]])
        for name, value in content.items():
            if name in declared and not _fits(value, declared[name]):
                raise ValueError(f"{name} is {value!r}, and not {_named(declared[name])}")


def _fits(value: Any, declared: Any) -> bool:
    origin, inside = typing.get_origin(declared), typing.get_args(declared)
    if value is None or declared is Any:
        # Saved for whatever was not set.
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, item) for item in inside if item is not type(None))
    if origin is typing.Literal:
        return isinstance(value, tuple({type(item) for item in inside}))
    kind = origin or declared
    if kind not in _PLAIN:
        # An enum or a config of its own: saved as a string or a dict.
        return isinstance(value, (str, dict))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        # Some were saved as 16.0.
        return not isinstance(value, bool) and isinstance(value, (int, float)) and value == int(value)
    if kind in (list, tuple):
        items = inside[:1] if kind is list else inside
        return isinstance(value, (list, tuple)) and all(_fits(item, items[0]) for item in value if items)
    if kind is dict and len(inside) == 2:
        return isinstance(value, dict) and all(_fits(item, inside[1]) for item in value.values())
    return isinstance(value, kind)


def _named(declared: Any) -> str:
    return str(getattr(declared, "__name__", declared) if typing.get_origin(declared) is None else declared).replace(
        "typing.", ""
    )
