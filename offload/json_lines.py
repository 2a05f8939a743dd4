"""Files of JSON lines that users give: UTF-8, an item a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offload.storage.errors import ConfigError

Item = tuple[str, int, Any]
"""Where it stands, in which line, and what."""

_BLANK = " \t\r"
"""What JSON takes for space within a line."""


def read_text(path: str | Path, option: str) -> str:
    """A file's text.

    Args:
        option: that named it, for messages.

    Raises:
        ConfigError: if it cannot be read, or is not UTF-8.
    """
    try:
        return decoded(Path(path).read_bytes(), f"{option} {path}")
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be read: {error.strerror}") from error


def decoded(content: bytes, what: str) -> str:
    """UTF-8 as text, without the byte-order mark that some editors write first. Raises ConfigError if it is none."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not UTF-8 text: byte {error.start:,} is {content[error.start]:#x}") from error


def json_lines(path: str | Path, option: str) -> Iterator[Item]:
    """The items of a file. Only a line feed ends a line: other separators, like U+2028, stand in strings as they are.

    Raises:
        ConfigError: if it cannot be read, or names the line that is not JSON.
    """
    for number, line in enumerate(read_text(path, option).split("\n"), 1):
        if line.strip(_BLANK):
            where = f"{path}, line {number}"
            try:
                # Control characters within strings, which JSON wants escaped, are taken as well.
                yield where, number, json.loads(line, strict=False)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{where} is not JSON ({error})") from error


def conversation(where: str, messages: Any) -> list[dict[str, str]]:
    """Check that these are messages of a chat, at least one. Raises ConfigError, which names the wrong one."""
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f'{where}: "messages" is no list of {{"role": "...", "content": "..."}}')
    for index, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(name), str) for name in ("role", "content")):
            raise ConfigError(f'{where}: message {index} is not {{"role": "...", "content": "..."}}')
    return messages
