"""Threads that are still generating when their session ends."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from offload.runtime.module_wrappers import Forward, ForwardWrap
from offload.storage.errors import SessionError


class GenerationWatch:
    """Knows which threads are inside of `generate`; those that still are when it is closed get a SessionError.

    They would go on with the plain model, outside of any budget, and with a cache that is no more.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._inside: dict[int, int] = {}
        self._guard: ForwardWrap | None = None

    @contextmanager
    def generating(self) -> Iterator[None]:
        """This thread generates."""
        thread = threading.get_ident()
        with self._lock:
            self._inside[thread] = self._inside.get(thread, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._inside[thread] -= 1
                if not self._inside[thread]:
                    del self._inside[thread]
                if self._guard is not None and not self._inside:
                    self._guard.undo()
                    self._guard = None

    def close(self) -> None:
        """The session is over."""
        with self._lock:
            if self._inside.keys() - {threading.get_ident()}:
                self._guard = ForwardWrap(self._model, self._refusing)

    def _refusing(self, forward: Forward) -> Forward:
        def refused(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() in self._inside:
                raise SessionError(
                    "the session that this thread generates in was left; join the thread before leaving the context "
                    "(streamers end when generate does)"
                )
            return forward(*args, **kwargs)

        return refused
