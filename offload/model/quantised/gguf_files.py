"""Which files a GGUF checkpoint consists of: one, or the parts that llama.cpp splits large ones into."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from offload.storage.errors import CheckpointError, UnsupportedCheckpoint

SUFFIX = ".gguf"
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


def parts_of(path: str) -> list[str]:
    """All files of the checkpoint that a file belongs to, the first one first.

    Raises:
        CheckpointError: if one of them is not there.
    """
    match = _PART.match(path)
    if match is None:
        return [path]
    count = int(match["count"])
    parts = [f"{match['stem']}-{number:05}-of-{count:05}{SUFFIX}" for number in range(1, count + 1)]
    if missing := [part for part in parts if not os.path.isfile(part)]:
        raise CheckpointError(f"{missing[0]} is not there: {path} is one of {count} parts, all of which are needed")
    return parts


def find_gguf(place: str, name: str | None = None) -> str | None:
    """The (first) file of a GGUF checkpoint that a path names; None if it names none.

    Args:
        place: the file, or a folder with it.
        name: of the file in the folder; not needed where it holds one such checkpoint, and no other.

    Raises:
        CheckpointError: if the file is not there, or a part of it.
        UnsupportedCheckpoint: if the folder has several.
    """
    if place.endswith(SUFFIX) and os.path.isfile(place):
        return parts_of(place)[0]
    if not os.path.isdir(place):
        return None
    found = sorted(item for item in os.listdir(place) if item.endswith(SUFFIX))
    if name is not None:
        if name not in found:
            raise CheckpointError(f"gguf_file {name} is not in {place}, which holds {', '.join(found) or 'no GGUF file'}")
        return parts_of(os.path.join(place, name))[0]
    if os.path.exists(os.path.join(place, "config.json")) or not found:
        return None
    firsts = [item for item in found if (match := _PART.match(item)) is None or int(match["number"]) == 1]
    if len(firsts) > 1:
        raise UnsupportedCheckpoint(
            f"{place} holds {len(firsts)} GGUF checkpoints ({', '.join(firsts[:3])}); name one, like gguf_file={firsts[0]}"
        )
    return parts_of(os.path.join(place, (firsts or found)[0]))[0]


def patterns_of(name: str) -> Sequence[str]:
    """Names of the hub's files that a GGUF checkpoint consists of, as patterns."""
    match = _PART.match(name)
    return [name] if match is None else [f"{match['stem']}-*-of-{match['count']}{SUFFIX}"]


@contextmanager
def made_once(name: str) -> Iterator[None]:
    """What the package gguf makes under this name is made once: transformers asks for it again and again.

    Raises:
        ImportError: without the package.
    """
    import gguf

    module: Any = gguf
    maker = getattr(module, name)
    setattr(module, name, lru_cache(maxsize=1)(maker))
    try:
        yield
    finally:
        setattr(module, name, maker)
