"""What a disk gives to plain reads: the rate that streaming is measured against."""

import os
import statistics
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter

from offload.storage.blocks import align_down
from offload.storage.host_buffer import HostBuffer
from offload.storage.io_engines.base import ReadEngine


@dataclass(frozen=True, slots=True)
class ReadShape:
    """How a disk is asked.

    Attributes:
        threads: requests at once.
        request_bytes: of one request.
    """

    threads: int
    request_bytes: int

    @property
    def memory_bytes(self) -> int:
        """The least memory that is read into."""
        return self.threads * self.request_bytes

    def __str__(self) -> str:
        return f"{self.threads} x {self.request_bytes >> 20} MiB"


SHAPES = (ReadShape(2, 4 << 20), ReadShape(4, 1 << 20), ReadShape(4, 8 << 20), ReadShape(8, 4 << 20))
"""Which of them a disk likes best is its own affair."""

_MEMORY_BYTES = 64 << 20
"""More than caches hold: into a few MiB, used again and again, a fast disk reads a fifth faster, and weights go elsewhere."""


@dataclass(frozen=True, slots=True)
class ReadSpeed:
    """The best of what was tried.

    Attributes:
        tried: bytes a second of each shape.
    """

    tried: dict[ReadShape, float]

    @property
    def shape(self) -> ReadShape:
        return max(self.tried, key=lambda shape: self.tried[shape])

    @property
    def bytes_per_second(self) -> float:
        return self.tried[self.shape]


Range = tuple[str, int, int]
"""Path, offset and bytes, in whole units of the engine."""


def spans(path: str, span_bytes: int, unit_bytes: int) -> list[Range]:
    """The beginning of a file, in whole units."""
    return [(path, 0, align_down(min(span_bytes, os.path.getsize(path)), unit_bytes))]


def read_speed(
    engine: ReadEngine,
    ranges: Sequence[Range],
    shapes: Sequence[ReadShape] = SHAPES,
    rounds: int = 1,
    memory: memoryview | None = None,
) -> ReadSpeed:
    """Read the ranges in each shape in turn, and throw the bytes away.

    The memory that is read into is there before the clock starts, since making a page costs as much as reading it, and all of
    it is used in turn.

    Args:
        rounds: the median of so many counts.
        memory: aligned, of the largest shape's `memory_bytes` or more; by default its own.

    Raises:
        ReadError: as the engine does.
    """
    if memory is None:
        memory = HostBuffer(max(_MEMORY_BYTES, *(shape.memory_bytes for shape in shapes))).memory
    for path in {path for path, _, _ in ranges}:
        engine.open(path)
    seen: dict[ReadShape, list[float]] = {shape: [] for shape in shapes}
    for begin in range(rounds):
        for index in range(len(shapes)):
            shape = shapes[(begin + index) % len(shapes)]
            seen[shape].append(_bytes_per_second(engine, ranges, shape, memory))
    return ReadSpeed({shape: statistics.median(rates) for shape, rates in seen.items()})


def _bytes_per_second(engine: ReadEngine, ranges: Sequence[Range], shape: ReadShape, memory: memoryview) -> float:
    size = shape.request_bytes
    ends = {path: os.path.getsize(path) for path, _, _ in ranges}
    requests = deque(
        (path, offset + start, min(size, nbytes - start)) for path, offset, nbytes in ranges for start in range(0, nbytes, size)
    )

    lanes = deque(memory[start : start + size] for start in range(0, len(memory) - size + 1, size))

    def serve(_: int) -> None:
        while requests:
            try:
                path, offset, nbytes = requests.popleft()
            except IndexError:
                return
            lane = lanes.popleft()
            # A checkpoint may end in the middle of a unit.
            engine.read(path, offset, lane[:nbytes], min(nbytes, ends[path] - offset))
            lanes.append(lane)

    with ThreadPoolExecutor(shape.threads, "offload-read-speed") as pool:
        begun = perf_counter()
        list(pool.map(serve, range(shape.threads)))
        seconds = perf_counter() - begun
    return sum(nbytes for _, _, nbytes in ranges) / seconds
