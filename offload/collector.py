"""Python's collector of cyclic garbage, held back while very many objects are made that all stay."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_holders = 0
_was_enabled = False


@contextmanager
def held_collector() -> Iterator[None]:
    """Collect nothing inside, in any thread: libraries and models are imported and made here, and none of it is garbage.

    Each full collection looks at all that transformers defines, for 0.4 s, and finds nothing.
    """
    global _holders, _was_enabled
    with _lock:
        if _holders == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0 and _was_enabled:
                gc.enable()
