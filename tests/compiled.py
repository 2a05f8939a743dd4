"""The compiled decoders, built once for all runs of the tests."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from offload.storage.errors import ConfigError
from offload.storage.native.library import build, library, library_path

_CACHE = Path.home() / ".cache" / "offload-tests"


@contextmanager
def compiled_decoders() -> Iterator[None]:
    """Meanwhile what is encoded is decoded by them; skipped where no compiler is."""
    with mock.patch.dict(os.environ, OFFLOAD_PROFILES=str(_CACHE)):
        try:
            if not library_path().exists():
                build()
        except ConfigError as error:
            pytest.skip(str(error))
        library.cache_clear()
        assert library() is not None
    try:
        yield
    finally:
        library.cache_clear()
