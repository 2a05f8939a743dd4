"""The lock that lets one forward at a time compute."""

import os
import threading
from collections.abc import Iterable

import torch

from offload.storage.errors import SessionError


class SharedLock:
    """A re-entrant lock that whoever holds it may share with threads that run in its place, one at a time.

    While it is held, what the holder differentiates stays in the holder's thread: on a card autograd has a thread of its own,
    which would wait for this lock for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._admitted: frozenset[str] = frozenset()
        self._depth = 0
        """How often the holder took it."""
        self._one_threaded: torch.autograd.set_multithreading_enabled | None = None
        """What the holder's thread goes back to in the end."""

    def admit(self, names: Iterable[str]) -> None:
        """Threads of these names hold it as long as the holder does."""
        self._admitted = frozenset(names)

    def dismiss(self) -> None:
        self._admitted = frozenset()

    def __enter__(self) -> None:
        if os.getpid() != self._process:
            # The threads that bring weights are not here.
            raise SessionError(
                "this process was forked from the one that has the session; offload in the child itself, or start it otherwise "
                "(multiprocessing's spawn)"
            )
        if threading.current_thread().name not in self._admitted:
            self._lock.acquire()
            if not self._depth:
                self._one_threaded = torch.autograd.set_multithreading_enabled(False)
            self._depth += 1

    def __exit__(self, *error: object) -> None:
        if threading.current_thread().name not in self._admitted:
            self._depth -= 1
            if not self._depth and self._one_threaded is not None:
                self._one_threaded.__exit__(None, None, None)
            self._lock.release()
