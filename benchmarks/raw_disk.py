"""What the disk gives to somebody who does nothing but read and write."""

import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES
from offload.storage.host_buffer import HostBuffer
from offload.storage.io_engines.posix import PosixEngine
from offload.storage.read_speed import Range, ReadShape, read_speed, spans

_WRITE_BYTES = 8 << 20
_BESIDE_WRITES = ReadShape(4, 8 << 20)


def reads_of(ranges: Sequence[Range]) -> dict[str, Any]:
    """The best of a few numbers and sizes of O_DIRECT requests, over all the ranges."""
    engine = PosixEngine()
    try:
        speed = read_speed(engine, ranges)
    finally:
        engine.close()
    tried = {str(shape): rate for shape, rate in speed.tried.items()}
    return {"bytes_per_second": speed.bytes_per_second, "shape": str(speed.shape), "tried": tried}


def beginnings(folder: str, total_bytes: int) -> list[Range]:
    """So many bytes of a checkpoint's files, from the first on; all of them at most."""
    ranges: list[Range] = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        ranges += spans(str(path), total_bytes, BLOCK_ALIGNMENT_BYTES)
        total_bytes -= ranges[-1][2]
    return ranges


def reads_and_writes(folder: str, read_bytes: int, written_bytes: int) -> dict[str, float]:
    """Reads of one file while another thread writes to it, and each of them alone."""
    engine = PosixEngine()
    with tempfile.NamedTemporaryFile(dir=folder) as file, ThreadPoolExecutor(1) as pool:
        content = HostBuffer(_WRITE_BYTES)
        content.memory[:] = os.urandom(_WRITE_BYTES)
        descriptor = os.open(file.name, os.O_RDWR | os.O_DIRECT)

        def write() -> None:
            for offset in range(0, written_bytes, _WRITE_BYTES):
                os.pwrite(descriptor, content.memory, offset)

        # What is written for the first time is slower: space is found for it.
        write()
        writing = _seconds(write)
        ranges = spans(file.name, written_bytes, engine.unit_bytes) * -(-read_bytes // written_bytes)
        memory = HostBuffer(2 * _BESIDE_WRITES.memory_bytes).memory
        reading = read_speed(engine, ranges, [_BESIDE_WRITES], memory=memory)

        def both() -> None:
            writes = pool.submit(write)
            read_speed(engine, ranges, [_BESIDE_WRITES], memory=memory)
            writes.result()

        seconds = _seconds(both)
        os.close(descriptor)
    engine.close()
    moved = written_bytes + sum(nbytes for _, _, nbytes in ranges)
    return {
        "write_bytes_per_second": written_bytes / writing,
        "read_bytes_per_second": reading.bytes_per_second,
        "both_bytes_per_second": moved / seconds,
    }


def _seconds(run: Any) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun
