"""What a session has to say beside its results: everything that is slower or otherwise than one would expect."""

import logging
import threading

_log = logging.getLogger("offload")


class Notes:
    """Sentences, each kept once; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sentences: dict[str, None] = {}

    def warn(self, sentence: str) -> None:
        """Record a sentence once, however often it recurs: it may be found in every layer of every pass."""
        with self._lock:
            if sentence in self._sentences:
                return
            self._sentences[sentence] = None
        _log.info("%s", sentence)

    @property
    def sentences(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._sentences)
