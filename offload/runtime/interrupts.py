"""Ctrl-C held back while the runtime takes hold of a model or lets it go."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class HeldInterrupts:
    """While active, Ctrl-C waits for `let_through` or for the end, so that it never finds something half done.

    Python delivers the signal to the main thread alone; in another thread, and where the signal is ignored or handled
    outside Python, this does nothing.
    """

    def __init__(self) -> None:
        self._handler: Any = None
        self._arrived: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> "HeldInterrupts":
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(handler):
            self._handler = handler
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self.let_through()

    def let_through(self) -> None:
        """Handle an interrupt that has arrived, as it would have been: by default, raise KeyboardInterrupt."""
        if self._arrived is not None:
            arrived, self._arrived = self._arrived, None
            self._handler(*arrived)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._arrived = number, frame
