"""What the commands show while they work: text on stdout, everything else on stderr."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from offload.config import Progress as ProgressCall
from offload.storage.errors import ConfigError

_LEAST_BYTES = 1 << 10
_LONGEST_WORD = 60


def say(text: str) -> None:
    """A line for people, beside the output."""
    print(text, file=sys.stderr)


def check_writable(path: str | None) -> None:
    """Raise ConfigError, before any work is done for it, if a file cannot be written."""
    if path is None:
        return
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise ConfigError(f"{path} cannot be written: name a file in a folder that exists and is yours")


def typed() -> str:
    """The command as it was typed, with long texts cut: they may be private, and are not what it is told by."""
    words = ["offload", *sys.argv[1:]]
    return shlex.join(word if len(word) <= _LONGEST_WORD else f"{word[:_LONGEST_WORD]}..." for word in words)


def print_table(table: RenderableType) -> None:
    """On stdout; as wide as it needs where that is not a terminal."""
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)


def live_console() -> Console:
    """Where a view is drawn that changes: beside the output."""
    return Console(stderr=True)


@contextmanager
def progress_bar() -> Iterator[ProgressCall]:
    """A bar on stderr for each long step, on a terminal; elsewhere nothing is drawn."""
    bars = Bars(Console(stderr=True))
    try:
        yield bars.show
    finally:
        bars.close()


class Bars:
    """Bars that are drawn while something takes long, and leave no trace."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._drawn: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._closed = not console.is_terminal

    def show(self, what: str, done: int, total: int) -> None:
        """So much of `what` is done; once all of it is, its bar goes."""
        if self._closed:
            return
        if done >= total:
            if self._drawn is not None and what in self._tasks:
                self._drawn.remove_task(self._tasks.pop(what))
            if not self._tasks:
                self._stop()
            return
        if self._drawn is None:
            self._drawn = self._new(total)
            self._drawn.start()
        if what not in self._tasks:
            self._tasks[what] = self._drawn.add_task(what, total=total)
        self._drawn.update(self._tasks[what], completed=done, total=total)

    def close(self) -> None:
        """Nothing is drawn any more."""
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        if self._drawn is not None:
            self._drawn.stop()
            self._drawn = None
            self._tasks.clear()

    def _new(self, total: int) -> Progress:
        # What is not counted in bytes has a few steps.
        bytes_done = (DownloadColumn(binary_units=True), TimeRemainingColumn()) if total >= _LEAST_BYTES else ()
        columns = (TextColumn("{task.description}"), BarColumn(), *bytes_done)
        return Progress(*columns, console=self._console, transient=True)
