"""Claim to be checked before any claim of overlap: how far this machine can read and compute at the same time at all.

Products with weights in all threads, O_DIRECT reads by four, each alone and both at once, in this process and with nothing
of ours between them. What is left of each rate while the other runs bounds a step that computes for `c` seconds and reads
for `r`: where it is little, the larger of the two is out of anybody's reach.

    python -m benchmarks.overlap --model FOLDER --compute 1.54 --reads 1.36
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from itertools import cycle

import torch

from benchmarks.raw_disk import beginnings
from offload.storage.host_buffer import HostBuffer
from offload.storage.io_engines.posix import PosixEngine

_THREADS, _PIECE_BYTES = 4, 8 << 20
_ROWS, _WIDTH, _LAYERS = 32, 1792, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint folder, whose weights are read")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement (default: 4)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compute", type=float, help="seconds that a step computes, alone")
    parser.add_argument("--reads", type=float, help="seconds that its bytes take, alone")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the products")
    request = parser.parse_args()
    dtype = getattr(torch, request.dtype)
    rounds = [measure(request.model, request.seconds, dtype) for _ in range(request.rounds)]
    left = {name: statistics.median(item[name] for item in rounds) for name in ("compute_left", "reads_left")}
    result: dict[str, object] = {"rounds": rounds, **left}
    if request.compute and request.reads:
        result["least_step_seconds"] = least_seconds(request.compute, request.reads, left["compute_left"], left["reads_left"])
    print(json.dumps(result, indent=2))


def measure(folder: str, seconds: float, dtype: torch.dtype) -> dict[str, float]:
    """Rates alone and at once, and what is left of each."""
    compute, reads = _products(dtype), _Reads(folder)
    products_alone = _rate(compute, seconds)
    bytes_alone = reads.during(lambda: time.sleep(seconds))
    found: list[float] = []
    bytes_at_once = reads.during(lambda: found.append(_rate(compute, seconds)))
    return {
        "products_per_second_alone": products_alone,
        "bytes_per_second_alone": bytes_alone,
        "compute_left": found[0] / products_alone,
        "reads_left": bytes_at_once / bytes_alone,
    }


def least_seconds(compute: float, reads: float, compute_left: float, reads_left: float) -> float:
    """The least that a step can take whose compute and reads slow each other down for as long as both go on."""
    together = min(compute / compute_left, reads / reads_left)
    return together + max(0.0, compute - together * compute_left) + max(0.0, reads - together * reads_left)


def _products(dtype: torch.dtype) -> Callable[[], None]:
    """One round of products with weights that no cache holds."""
    weights = [torch.randn(4 * _WIDTH, _WIDTH, dtype=dtype) for _ in range(_LAYERS)]
    rows = torch.randn(_ROWS, _WIDTH, dtype=dtype)

    def once() -> None:
        for weight in weights:
            torch.nn.functional.linear(rows, weight)

    return once


def _rate(work: Callable[[], None], seconds: float) -> float:
    work()
    begun, rounds = time.perf_counter(), 0
    while (passed := time.perf_counter() - begun) < seconds:
        work()
        rounds += 1
    return rounds / passed


class _Reads:
    """Reads a checkpoint over and over, into memory that is there already."""

    def __init__(self, folder: str) -> None:
        self._engine = PosixEngine()
        self._memory = HostBuffer(_THREADS * _PIECE_BYTES * 2).memory
        self._pieces = cycle(
            (path, start)
            for path, begin, nbytes in beginnings(folder, 1 << 50)
            for start in range(begin // 4096 * 4096, begin + nbytes - _PIECE_BYTES, _PIECE_BYTES)
        )
        self._lock = threading.Lock()

    def during(self, work: Callable[[], object]) -> float:
        """Bytes a second while the work goes on."""
        stop, moved = threading.Event(), [0] * _THREADS

        def serve(index: int) -> None:
            lane = self._memory[index * _PIECE_BYTES : (index + 1) * _PIECE_BYTES]
            while not stop.is_set():
                with self._lock:
                    path, start = next(self._pieces)
                self._engine.open(path)
                self._engine.read(path, start, lane, _PIECE_BYTES)
                moved[index] += _PIECE_BYTES

        threads = [threading.Thread(target=serve, args=(index,)) for index in range(_THREADS)]
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


if __name__ == "__main__":
    with torch.inference_mode():
        main()
