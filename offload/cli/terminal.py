"""What the commands show while they work: text on stdout, everything else on stderr."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from offload.config import Progress as ProgressCall


def say(text: str) -> None:
    """A line for people, beside the output."""
    print(text, file=sys.stderr)


@contextmanager
def progress_bar() -> Iterator[ProgressCall]:
    """A bar on stderr for each long step, on a terminal; elsewhere nothing is drawn."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total, visible=done < total)

        yield show
