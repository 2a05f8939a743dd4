"""Texts that an answer ends before."""

from collections.abc import Callable, Sequence


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of `stops` in it; all of it if there is none."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


class StopFilter:
    """Passes text on as it comes, but for what may turn out to be a stop, and all that follows one.

    Args:
        passed_on: called with each piece.
    """

    def __init__(self, stops: Sequence[str], passed_on: Callable[[str], None]) -> None:
        self._stops = list(stops)
        self._passed_on = passed_on
        self._held = ""
        self._stopped = False

    def add(self, text: str, end: bool = False) -> None:
        """One more piece; the last one with `end`."""
        if self._stopped:
            return
        self._held += text
        clear = before_stop(self._held, self._stops)
        self._stopped = len(clear) < len(self._held)
        kept = 0 if end or self._stopped else max((_overlap(clear, stop) for stop in self._stops), default=0)
        if out := clear[: len(clear) - kept]:
            self._passed_on(out)
        self._held = clear[len(clear) - kept :]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` may begin with."""
    return next((count for count in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:count])), 0)
