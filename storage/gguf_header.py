"""Where each tensor of a GGUF file lies, from its header alone (format: ggml's docs/gguf.md, versions 2 and 3)."""

import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from offload.storage.blocks import FileRange
from offload.storage.errors import CorruptCheckpoint, UnsupportedCheckpoint

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_MOST_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_DEFAULT_ALIGNMENT = 32

GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""Types by ggml's number: the name, and the numbers and bytes of a block."""

_OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8",
    25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: its shape as torch has it, the name of its ggml type, and the bytes that hold it."""

    shape: tuple[int, ...]
    kind: str
    range: FileRange


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says of itself.

    Attributes:
        values: its metadata but for lists, by key.
        tensors: by name.
    """

    values: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: str) -> GgufHeader:
    """Read it.

    Raises:
        CorruptCheckpoint: if it is no such file, or was cut short.
        UnsupportedCheckpoint: if a tensor has a type that is not known here.
    """
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            cursor = _Cursor(content)
            if content[:4] != _MAGIC:
                raise ValueError("it does not begin as one does")
            cursor.at = 4
            version, tensors, entries = cursor.take("I"), cursor.take("Q"), cursor.take("Q")
            if version not in _VERSIONS:
                raise ValueError(f"its version is {version}, and {_VERSIONS} are read")
            values = dict(item for item in (cursor.entry() for _ in range(entries)) if item[1] is not None)
            described = [cursor.tensor() for _ in range(tensors)]
            alignment = values.get("general.alignment", _DEFAULT_ALIGNMENT)
            if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
                raise ValueError(f"its alignment is {alignment!r}")
            start = -(-cursor.at // alignment) * alignment
    except (ValueError, struct.error, IndexError, UnicodeDecodeError, OverflowError) as error:
        raise CorruptCheckpoint(
            f"{path} ({size:,} bytes) cannot be read as a GGUF file: {error}. Download it again."
        ) from error
    found = {name: _placed(path, size, name, shape, kind, start + offset) for name, shape, kind, offset in described}
    if len(found) != len(described):
        raise CorruptCheckpoint(f"{path} names a tensor twice. Download it again.")
    return GgufHeader(values, found)


class _Cursor:
    """A place in a file's bytes."""

    def __init__(self, content: mmap.mmap) -> None:
        self.at = 0
        self._content = content

    def take(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self._content, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return value

    def text(self) -> str:
        return self._bytes(self.take("Q")).decode()

    def entry(self) -> tuple[str, Any]:
        """A key and its value; None for a list, which is passed over."""
        return self.text(), self._value(self.take("I"))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and place."""
        name, dimensions = self.text(), self.take("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(self.take("Q") for _ in range(dimensions))
        return name, shape[::-1], self.take("I"), self.take("Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.take(_scalar(kind))
        inner, count = self.take("I"), self.take("Q")
        if inner == _STRING:
            self._skip_texts(count)
        elif inner == _ARRAY:
            raise ValueError("a list of lists, which no GGUF file has")
        else:
            self._bytes(struct.calcsize(f"<{_scalar(inner)}") * count)
        return None

    def _skip_texts(self, count: int) -> None:
        unpack: Callable[..., tuple[int]] = struct.Struct("<Q").unpack_from
        content, at = self._content, self.at
        for _ in range(count):
            at += 8 + unpack(content, at)[0]
        self.at = at

    def _bytes(self, count: int) -> bytes:
        if count > len(self._content) - self.at:
            raise ValueError(f"it was cut short: {count:,} bytes are to follow, and {len(self._content) - self.at:,} do")
        self.at += count
        return self._content[self.at - count : self.at]


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value has the type {kind}, which GGUF does not have")
    return _SCALARS[kind]


def _placed(path: str, size: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
    if kind not in GGML_TYPES:
        called = _OTHER_TYPES.get(kind, f"type {kind}")
        known = ", ".join(name for name, _, _ in GGML_TYPES.values())
        raise UnsupportedCheckpoint(f"{path}: {name} is stored as {called}, which is not decoded here; known are {known}")
    called, numbers, nbytes = GGML_TYPES[kind]
    if not shape or shape[-1] % numbers:
        raise CorruptCheckpoint(f"{path}: {name} has the shape {list(shape)}, and {called} has blocks of {numbers} numbers")
    place = FileRange(path, offset, prod(shape) // numbers * nbytes)
    if place.end > size:
        raise CorruptCheckpoint(f"{path} has {size:,} bytes, and {name} ends at {place.end:,}: it was cut short")
    return GgufTensor(shape, called, place)
