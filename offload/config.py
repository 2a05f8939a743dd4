"""What a user may ask for, read and checked before anything is loaded."""

import re
from collections.abc import Callable
from typing import get_args

from offload.choices import Exactness
from offload.storage.errors import ConfigError, gib

EXACTNESS: tuple[Exactness, ...] = get_args(Exactness)
IDENTICAL, ROUNDING = EXACTNESS

_UNITS = {"": 1, "b": 1, "k": 1000, "kb": 1000, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12, "tb": 10**12,
          "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}  # fmt: skip

_LEAST_WITHOUT_UNIT = 1 << 20
"""Fewer bytes, as a text, are a size whose unit was forgotten."""

Progress = Callable[[str, int, int], None]
"""A function that is called with (what, done bytes, total bytes) during long steps."""


def parse_bytes(text: str | int | None, name: str = "size") -> int | None:
    """`"12GiB"`, `"8 GB"`, `4096` to bytes; None stays None.

    Raises:
        ConfigError: if it cannot be read, or is not positive.
    """
    if text is None:
        return None
    if isinstance(text, int) and not isinstance(text, bool):
        count = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text) if isinstance(text, str) else None
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise ConfigError(f'{name}={text!r} is not a size; write it like "8GiB", "500MB", or as a number of bytes')
        count = int(float(match[1]) * unit)
        if not match[2] and count < _LEAST_WITHOUT_UNIT:
            raise ConfigError(f"{name}={text!r} is {gib(count)}; give a unit, like {match[1]}GiB")
    if count <= 0:
        raise ConfigError(f"{name}={text!r} must be more than nothing")
    return count
