"""What the commands show while they work: text on stdout, everything else on stderr."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from offload.config import Progress as ProgressCall
from offload.storage.errors import ConfigError


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


def print_table(table: RenderableType) -> None:
    """On stdout; as wide as it needs where that is not a terminal."""
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)


def live_console() -> Console:
    """Where a view is drawn that changes: beside the output."""
    return Console(stderr=True)


@contextmanager
def progress_bar(counted: bool = True) -> Iterator[ProgressCall]:
    """A bar on stderr for each long step, on a terminal; elsewhere nothing is drawn.

    Args:
        counted: the steps are counted in bytes.
    """
    console = Console(stderr=True)
    bytes_done = (DownloadColumn(binary_units=True), TimeRemainingColumn()) if counted else ()
    columns = (TextColumn("{task.description}"), BarColumn(), *bytes_done)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total, visible=done < total)

        yield show
