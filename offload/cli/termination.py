"""SIGTERM, as a job scheduler sends it: what is under way is brought to an end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGTERM_STATUS = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """The process was asked to end."""


@contextmanager
def raising() -> Iterator[None]:
    """SIGTERM raises `Terminated`, as Ctrl-C raises KeyboardInterrupt."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    with _handled_by(end):
        yield


@contextmanager
def remembered() -> Iterator[threading.Event]:
    """The first SIGTERM is only remembered; the next one raises `Terminated`."""
    asked = threading.Event()

    def remember(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise Terminated
        asked.set()

    with _handled_by(remember):
        yield asked


@contextmanager
def _handled_by(handler: object) -> Iterator[None]:
    """Nothing but the main thread is told of signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)  # type: ignore[arg-type]
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
