"""Ctrl-C and SIGTERM held back while the runtime takes hold of a model or lets it go."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class HeldInterrupts:
    """While active, these signals wait for `let_through` or for the end, so that they never find something half done.

    Python delivers them to the main thread alone; in another thread, and where one is ignored or handled outside Python, this
    does nothing.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._arrived: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> "HeldInterrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.let_through()

    def let_through(self) -> None:
        """Handle an interrupt that has arrived, as it would have been: by default, raise KeyboardInterrupt."""
        if self._arrived is not None:
            arrived, self._arrived = self._arrived, None
            self._handlers[arrived[0]](*arrived)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._arrived = number, frame
