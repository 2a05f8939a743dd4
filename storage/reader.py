"""Blocks from disk into host memory: a read plan, run by the disk link's threads."""

import ctypes
import time
import zlib
from collections.abc import Callable, Sequence

import torch

from offload.storage.blocks import FileRange
from offload.storage.codecs.weights import Source
from offload.storage.errors import CorruptCheckpoint
from offload.storage.io_engines.base import ReadEngine
from offload.storage.load_plan import LoadPlan, plan_load
from offload.storage.read_plan import ReadPlan
from offload.storage.read_speed import ReadShape, read_speed, spans
from offload.storage.transfer import Link, Part, Transfer

_PART_BYTES = 8 << 20
"""Large enough for the disk's full speed, small enough that a block's parts keep all threads busy."""


_FEW_ROWS = 16
"""So few are read by the thread that needs them."""


class DiskReader:
    """Reads blocks with one engine over one link.

    Args:
        engine: how files are read.
        link: whose threads read.
    """

    def __init__(self, engine: ReadEngine, link: Link) -> None:
        self.engine = engine
        self.link = link
        self._verified: set[FileRange] = set()
        self._sample: str | None = None

    def plan(self, sources: Sequence[Source]) -> LoadPlan:
        """Open the files of `sources` and lay them out for `read`."""
        load_plan = plan_load(sources, self.engine.unit_bytes)
        for path in {item.path for item in load_plan.ranges}:
            self.engine.open(path)
            self._sample = self._sample or path
        return load_plan

    def read(
        self,
        load_plan: LoadPlan,
        memory: memoryview,
        then: Callable[[], None] | None = None,
        name: str = "",
        background: bool = False,
    ) -> Transfer:
        """Start filling `memory`, which starts at a multiple of the engine's unit and holds `load_plan.slot_bytes`.

        Args:
            then: runs in a link thread when the tensors are in place.
            name: of the block, for the trace.
            background: nobody needs it yet.
        """
        read_plan, read_into = load_plan.read_plan, load_plan.read_into(memory)

        def finish() -> None:
            self._settle(load_plan.ranges, read_plan, read_into)
            load_plan.decode(torch.frombuffer(memory, dtype=torch.uint8))
            if then is not None:
                then()

        submit = self.link.submit_in_background if background else self.link.submit
        return submit(read_plan.payload_bytes, self._parts(read_plan, read_into), finish, name)

    def read_rows(self, table: FileRange, rows: Sequence[int], row_bytes: int, target: torch.Tensor, name: str = "") -> None:
        """Read single rows of a table into `target` (contiguous, [len(rows), row_bytes] as bytes), and wait for them.

        Raises:
            ReadError: as the engine does.
        """
        memory = memoryview(target.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        self.engine.open(table.path)

        def part(index: int) -> Part:
            lane = memory[index * row_bytes : (index + 1) * row_bytes]
            return lambda: self.engine.read_unaligned(table.path, table.offset + rows[index] * row_bytes, lane)

        if len(rows) <= _FEW_ROWS:
            # The link's threads may all be in the middle of a large part.
            begun = time.perf_counter()
            for index in range(len(rows)):
                part(index)()
            self.link.count(name, begun, time.perf_counter(), len(memory))
        else:
            self.link.submit_first(len(memory), [part(index) for index in range(len(rows))], name).wait()

    @property
    def shape(self) -> ReadShape:
        """How the disk is asked."""
        return ReadShape(self.link.threads, _PART_BYTES)

    def measure(self, span_bytes: int, memory: memoryview) -> float | None:
        """Bytes a second of the engine right now, asked as the link asks, on at most `span_bytes` of what was planned first.

        None if that is too short to tell anything.

        Args:
            memory: aligned, of the shape's `memory_bytes`, to read into.
        """
        if self._sample is None:
            return None
        ranges = spans(self._sample, span_bytes, self.engine.unit_bytes)
        if ranges[0][2] < self.shape.memory_bytes:
            return None
        return read_speed(self.engine, ranges, [self.shape], memory=memory).bytes_per_second

    def _parts(self, read_plan: ReadPlan, memory: memoryview) -> list[Part]:
        parts: list[Part] = []
        for read in read_plan.reads:
            for start in range(0, read.nbytes, _PART_BYTES):
                size = min(_PART_BYTES, read.nbytes - start)
                target = memory[read.slot_offset + start : read.slot_offset + start + size]
                parts.append(
                    _part(self.engine, read.path, read.file_offset + start, target, min(size, read.needed_bytes - start))
                )
        return parts

    def _settle(self, ranges: Sequence[FileRange], read_plan: ReadPlan, memory: memoryview) -> None:
        """Move the tensors to their places, and check at the first read those whose checksum is known."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for move in read_plan.moves:
            ctypes.memmove(address + move.target, address + move.source, move.nbytes)
        for item, offset in zip(ranges, read_plan.offsets, strict=True):
            if item.crc32 is not None and item not in self._verified:
                if zlib.crc32(memory[offset : offset + item.nbytes]) != item.crc32:
                    raise CorruptCheckpoint(
                        f"{item.path}: the bytes at {item.offset:,} do not match their checksum; "
                        "delete the file, it is made again"
                    )
                self._verified.add(item)


def _part(engine: ReadEngine, path: str, offset: int, target: memoryview, needed: int) -> Part:
    return lambda: engine.read(path, offset, target, needed)
