"""What products and reads leave of each other's rate, while both go on: they share the processor and its memory."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch

from offload.storage.host_buffer import HostBuffer
from offload.storage.io_engines.base import ReadEngine
from offload.storage.read_speed import Range, ReadShape

_WIDTH, _COUNT = 2048, 16
"""Weights that no cache holds."""


@dataclass(frozen=True, slots=True)
class Contention:
    """Shares of the rates alone that are left while both go on.

    Attributes:
        compute: of products.
        reads: of reads.
    """

    compute: float
    reads: float

    def least_seconds(self, compute: float, reads: float) -> float:
        """The least that work can take whose compute and reads, of so many seconds alone, slow each other down."""
        together = min(compute / self.compute, reads / self.reads)
        return together + max(0.0, compute - together * self.compute) + max(0.0, reads - together * self.reads)


def measure_contention(
    engine: ReadEngine, ranges: Sequence[Range], shape: ReadShape, seconds: float, dtype: torch.dtype, rows: int = 1
) -> Contention:
    """Measure products and reads, each alone and both at once, for so many seconds each.

    Args:
        ranges: of files, that are read over and over.
        rows: of the products: 1 as in decode.
    """
    products, reads = _products(dtype, rows), _Reads(engine, ranges, shape)
    products_alone = _rate(products, seconds)
    bytes_alone = reads.during(lambda: time.sleep(seconds))
    found: list[float] = []
    bytes_at_once = reads.during(lambda: found.append(_rate(products, seconds)))
    return Contention(min(1.0, found[0] / products_alone), min(1.0, bytes_at_once / bytes_alone))


def _products(dtype: torch.dtype, rows: int) -> Callable[[], None]:
    weights = [torch.randn(_WIDTH, _WIDTH, dtype=dtype) for _ in range(_COUNT)]
    inputs = torch.randn(rows, _WIDTH, dtype=dtype)

    def once() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs, weight)

    return once


def _rate(work: Callable[[], None], seconds: float) -> float:
    work()
    begun, rounds = time.perf_counter(), 0
    while (passed := time.perf_counter() - begun) < seconds:
        work()
        rounds += 1
    return rounds / passed


class _Reads:
    """Reads ranges over and over, into memory that is there already."""

    def __init__(self, engine: ReadEngine, ranges: Sequence[Range], shape: ReadShape) -> None:
        self._engine, self._shape = engine, shape
        self._memory = HostBuffer(shape.memory_bytes).memory
        for path in {path for path, _, _ in ranges}:
            engine.open(path)
        size = shape.request_bytes
        self._requests = cycle(
            [(path, start + at) for path, start, nbytes in ranges for at in range(0, nbytes - size + 1, size)]
        )
        self._lock = threading.Lock()

    def during(self, work: Callable[[], object]) -> float:
        """Bytes a second while the work goes on."""
        stop, size = threading.Event(), self._shape.request_bytes
        moved = [0] * self._shape.threads

        def serve(index: int) -> None:
            lane = self._memory[index * size : (index + 1) * size]
            while not stop.is_set():
                with self._lock:
                    path, start = next(self._requests)
                self._engine.read(path, start, lane, size)
                moved[index] += size

        threads = [threading.Thread(target=serve, args=(index,)) for index in range(len(moved))]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        try:
            work()
        finally:
            passed = time.perf_counter() - begun
            stop.set()
            for thread in threads:
                thread.join()
        return sum(moved) / passed
