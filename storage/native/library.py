"""The compiled library: built when asked, kept in the user's cache, and used from then on."""

import ctypes
import hashlib
import os
import platform
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from offload.storage.cache_folder import cache_folder
from offload.storage.errors import ConfigError

_SOURCES = (Path(__file__).with_name("decoders.cpp"),)
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-trapping-math", "-shared", "-fPIC", "-pthread")
_COMPILERS = ("c++", "g++", "clang++")
_SHOWN_LINES = 12

_wanted = True


def library_path() -> Path:
    """Where it is kept; of a name that says what it was made of, and for which processor."""
    kind = hashlib.sha256("\n".join((*_FLAGS, platform.machine(), _processor())).encode())
    for source in _SOURCES:
        kind.update(source.read_bytes())
    return cache_folder() / "native" / f"{kind.hexdigest()[:16]}.so"


def compiler() -> str | None:
    """`$CXX` (with options, if it has some), else the first of c++, g++ and clang++ that is there; None if none is."""
    chosen = os.environ.get("CXX")
    return next((name for name in ((chosen,) if chosen else _COMPILERS) if shutil.which(shlex.split(name)[0])), None)


def build() -> Path:
    """Compile it with `compiler()`.

    Raises:
        ConfigError: if there is no compiler, or it fails.
    """
    found = compiler()
    if found is None:
        asked = os.environ.get("CXX") or ", ".join(_COMPILERS)
        raise ConfigError(f"no C++ compiler: {asked} is not there. Install one, or set CXX")
    path = library_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    command = [*shlex.split(found), *_FLAGS, "-o", str(partial), *map(str, _SOURCES)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            shown = "\n".join(ended.stderr.splitlines()[:_SHOWN_LINES])
            raise ConfigError(f"{found} failed with status {ended.returncode}:\n{shown}")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    library.cache_clear()
    return path


@lru_cache
def library() -> ctypes.CDLL | None:
    """The library; None if it was not built from these sources for this processor."""
    path = library_path()
    if not _wanted or not path.is_file():
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


@contextmanager
def without_library() -> Iterator[None]:
    """Decode in torch meanwhile."""
    global _wanted
    before, _wanted = _wanted, False
    library.cache_clear()
    try:
        yield
    finally:
        _wanted = before
        library.cache_clear()


def _processor() -> str:
    """What the processor can: `-march=native` compiles for it alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
