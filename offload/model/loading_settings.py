"""How transformers behaves while it loads a model here."""

import contextlib
import os
from collections.abc import Iterator

import transformers


@contextlib.contextmanager
def threads_off() -> Iterator[None]:
    """Tensors are made one at a time: transformers' loading threads would hold many converted ones in memory at once."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def bar_off() -> Iterator[None]:
    """Opening a checkpoint reads nothing: transformers' bar for it would only flicker."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
