"""How the tensors of a block, scattered over files, come to lie aligned in a slot. Pure.

O_DIRECT reads whole units from whole-unit offsets, while safetensors puts its data wherever the header ends. So whole
units are read around each run of neighbouring tensors, and each tensor is then moved down to an aligned place. Where
the file already has the right alignment nothing moves.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from offload.storage.blocks import TENSOR_ALIGNMENT_BYTES, FileRange, align_down, align_up

_LARGEST_GAP_BYTES = 64 * 1024
"""Reading over a gap this small costs less than another request."""


@dataclass(frozen=True, slots=True)
class Read:
    """Whole units of a file, and where they land in the slot. The first three numbers are multiples of the unit.

    Attributes:
        needed_bytes: up to the end of the last tensor; a file may end behind it, within the last unit.
    """

    path: str
    file_offset: int
    nbytes: int
    slot_offset: int
    needed_bytes: int


@dataclass(frozen=True, slots=True)
class Move:
    """A tensor that landed at `source` belongs at `target`, which is never above it."""

    source: int
    target: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """The whole recipe for one block.

    Attributes:
        offsets: where each tensor ends up, in the order that the ranges were given.
        moves: in an order in which no move overwrites what a later one still needs.
        slot_bytes: room that the block takes in a slot, over-read units included.
        payload_bytes: bytes of the tensors alone.
    """

    offsets: tuple[int, ...]
    reads: tuple[Read, ...]
    moves: tuple[Move, ...]
    slot_bytes: int
    payload_bytes: int


def plan_reads(ranges: Sequence[FileRange], unit_bytes: int) -> ReadPlan:
    """Lay out the tensors in `ranges` in a slot that starts at a multiple of `unit_bytes`."""
    offsets = [0] * len(ranges)
    reads: list[Read] = []
    moves: list[Move] = []
    packed_end = 0  # the end of what already lies where it belongs
    landed_end = 0  # the end of what has been read so far
    for run in _runs(ranges):
        start = align_down(ranges[run[0]].offset, unit_bytes)
        end = max(ranges[index].end for index in run)
        nbytes = align_up(end, unit_bytes) - start
        targets = _targets([ranges[index] for index in run], start, packed_end, landed_end)
        # No tensor may have to move up: its place might still hold what another one needs.
        overshoot = max(target - (ranges[index].offset - start) for index, target in zip(run, targets, strict=True))
        slot_offset = align_up(max(landed_end, overshoot, 0), unit_bytes)
        for index, target in zip(run, targets, strict=True):
            source = slot_offset + ranges[index].offset - start
            offsets[index] = target
            if source != target:
                moves.append(Move(source, target, ranges[index].nbytes))
        reads.append(Read(ranges[run[0]].path, start, nbytes, slot_offset, end - start))
        landed_end = slot_offset + nbytes
        packed_end = targets[-1] + ranges[run[-1]].nbytes
    return ReadPlan(
        offsets=tuple(offsets),
        reads=tuple(reads),
        moves=tuple(moves),
        slot_bytes=max(landed_end, align_up(packed_end, unit_bytes)),
        payload_bytes=sum(item.nbytes for item in ranges),
    )


def plan_reads_at(ranges: Sequence[FileRange], targets: Sequence[int], unit_bytes: int) -> ReadPlan:
    """Lay pieces of files out at given places of a slot: one read a piece, in the order of their places.

    Args:
        ranges: by rising target.
        targets: where each is to end up; none overlaps the next.
    """
    reads: list[Read] = []
    moves: list[Move] = []
    landed_end = 0
    for item, target in zip(ranges, targets, strict=True):
        start = align_down(item.offset, unit_bytes)
        nbytes = align_up(item.end, unit_bytes) - start
        # Where it lands is never below its place, so that it moves down and over nothing but what is in place.
        slot_offset = align_up(max(landed_end, target - (item.offset - start), 0), unit_bytes)
        source = slot_offset + item.offset - start
        if source != target:
            moves.append(Move(source, target, item.nbytes))
        reads.append(Read(item.path, start, nbytes, slot_offset, item.end - start))
        landed_end = slot_offset + nbytes
    return ReadPlan(tuple(targets), tuple(reads), tuple(moves), landed_end, sum(item.nbytes for item in ranges))


def _runs(ranges: Sequence[FileRange]) -> Iterator[list[int]]:
    """Indices of the ranges, in file order, grouped where one read serves several."""
    run: list[int] = []
    order = sorted(range(len(ranges)), key=lambda index: (ranges[index].path, ranges[index].offset))
    for index in order:
        if run:
            last = ranges[run[-1]]
            if ranges[index].path != last.path or ranges[index].offset - last.end > _LARGEST_GAP_BYTES:
                yield run
                run = []
        run.append(index)
    if run:
        yield run


def _targets(run: Sequence[FileRange], start: int, packed_end: int, landed_end: int) -> list[int]:
    """Where the tensors of one run belong: where they land if that is aligned, else packed."""
    if all(item.offset % TENSOR_ALIGNMENT_BYTES == 0 for item in run):
        return [landed_end + item.offset - start for item in run]
    targets = []
    for item in run:
        packed_end = align_up(packed_end)
        targets.append(packed_end)
        packed_end += item.nbytes
    return targets
