"""Messages name arguments of Python; here they become the options of the command."""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

_ALIKE = {"disk_dir": {"disk"}, "max_tokens": {"max_new_tokens", "new_tokens", "sequence_length"}}
"""Arguments of Python that an option of another name sets."""

_BEFORE, _VALUE, _AFTER = r"(?<![\w/.-])", r"(?:='(?P<quoted>[^']*)'|=(?P<value>[^\s,;:)]*))?", r"(?![\w/(-]|\.\w)"
"""No part of a path or of a longer name; with a value or without."""


def as_options(message: str, request: Any) -> str:
    """The message, for somebody who typed a command: `cpu_memory='6'` becomes `--cpu-memory 6`."""
    known = {name: name for name in _names(request)}
    for name, others in _ALIKE.items():
        own = known.keys() & others
        if name not in known and own:
            known[name] = own.pop()
    words = "|".join(sorted(known, key=len, reverse=True))

    def option(found: re.Match[str]) -> str:
        value = found["quoted"] or found["value"]
        if value is None and "_" not in found["name"]:
            return found[0]
        return f"--{known[found['name']].replace('_', '-')}" + (f" {value}" if value else "")

    return re.sub(_BEFORE + rf"(?P<name>{words})" + _VALUE + _AFTER, option, message)


def _names(request: Any) -> Iterator[str]:
    for field in fields(request):
        value = getattr(request, field.name)
        if is_dataclass(value):
            yield from _names(value)
        else:
            yield field.name
