"""kvikio's reader: an optional extra, used only where a probe shows it faster.

It reads into host memory here, as every engine does: tensors of a safetensors file must be moved to aligned places, which
a transfer straight into device memory could not do. So this is no GPUDirect Storage.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy

from offload.storage.errors import ReadError
from offload.storage.host_buffer import HostBuffer
from offload.storage.io_engines.base import ReadEngine
from offload.storage.io_engines.posix import PosixEngine

_PROBE_BYTES = 32 << 20
_ROUNDS = 2


class KvikioEngine(PosixEngine):
    """Whole units are read by kvikio; single rows and the checks of files stay as they are.

    Raises:
        ImportError: if kvikio is not installed.
    """

    name = "kvikio"

    def __init__(self) -> None:
        super().__init__()
        import kvikio

        self._open_file: Callable[..., Any] = kvikio.CuFile
        self._handles: dict[str, Any] = {}

    def open(self, path: str, own: bool = False) -> None:
        super().open(path, own)
        if path not in self._handles:
            try:
                self._handles[path] = self._open_file(path, "r")
            except (RuntimeError, OSError) as error:
                raise ReadError(f"kvikio cannot open {path}: {error}") from error

    def read(self, path: str, file_offset: int, memory: memoryview, needed_bytes: int) -> None:
        target = numpy.frombuffer(memory, dtype=numpy.uint8)[:needed_bytes]
        try:
            count = self._handles[path].pread(target, needed_bytes, file_offset).get()
        except (RuntimeError, OSError) as error:
            raise ReadError(f"kvikio's read of {path} at byte {file_offset:,} failed: {error}") from error
        if count < needed_bytes:
            raise ReadError(f"{path} ends at byte {file_offset + count:,}: it was cut short while in use")

    def forget(self, path: str) -> None:
        handle = self._handles.pop(path, None)
        if handle is not None:
            handle.close()
        super().forget(path)


def choose_engine(sample: str | None) -> ReadEngine:
    """The faster engine for files like `sample`: kvikio where it is installed and a probe shows it faster, else POSIX."""
    posix = PosixEngine()
    if sample is None or os.path.getsize(sample) < _ROUNDS * _PROBE_BYTES:
        return posix
    try:
        kvikio = KvikioEngine()
    except ImportError:
        return posix
    try:
        faster = _bytes_per_second(kvikio, sample) > _bytes_per_second(posix, sample)
    except ReadError as error:
        kvikio.close()
        posix.fallbacks.append(f"kvikio is installed and cannot read here, so files are read with preadv ({error})")
        return posix
    slower = posix if faster else kvikio
    slower.close()
    return kvikio if faster else posix


def drop_cached(path: str, offset: int, nbytes: int) -> None:
    """Let the kernel forget the pages of a part of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _bytes_per_second(engine: ReadEngine, path: str) -> float:
    engine.open(path)
    buffer = HostBuffer(_PROBE_BYTES)
    best = 0.0
    for number in range(_ROUNDS):
        # Whoever reads through the page cache would find there what the other one, or the last session, has read.
        drop_cached(path, number * _PROBE_BYTES, _PROBE_BYTES)
        begun = time.perf_counter()
        engine.read(path, number * _PROBE_BYTES, buffer.memory, _PROBE_BYTES)
        best = max(best, _PROBE_BYTES / (time.perf_counter() - begun))
    return best
