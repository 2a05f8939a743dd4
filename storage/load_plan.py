"""How a block comes to lie in a slot as plain tensors: what is read, and what is decoded then. Pure but for `settle`.

What is stored in fewer bytes is read to the end of the slot, and decoded from there to its beginning, some rows after others:
a slot takes hardly more than the plain tensors, and no buffer beside it but for those rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from offload.storage.blocks import FileRange, align_up
from offload.storage.codecs.weights import EncodedTensor, Source, parts_of
from offload.storage.read_plan import ReadPlan, plan_reads

_PIECE_BYTES = 1 << 19
"""Values that are decoded at once: more would take more memory beside the slot."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One tensor: where its parts have landed, and where it goes."""

    source: Source
    places: tuple[int, ...]
    offset: int

    def run(self, slot: torch.Tensor) -> None:
        source, out = self.source, slot[self.offset : self.offset + self.source.nbytes]
        parts = [slot[at : at + part.nbytes] for at, part in zip(self.places, parts_of(source), strict=True)]
        if not isinstance(source, EncodedTensor):
            out.copy_(parts[0])
            return
        values = out.view(getattr(torch, source.spec.dtype)).view(source.spec.shape)
        for rows, stored in _pieces(source, parts):
            source.codec.decode(stored, values[rows])


def decoded_pieces(source: EncodedTensor, parts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Decode a tensor some rows at a time.

    Args:
        parts: what its ranges hold, uint8.
    """
    for rows, stored in _pieces(source, parts):
        count = (rows.stop or source.spec.shape[0]) - (rows.start or 0)
        values = torch.empty((count, *source.spec.shape[1:]), dtype=getattr(torch, source.spec.dtype))
        source.codec.decode(stored, values)
        yield values


def _pieces(source: EncodedTensor, parts: Sequence[torch.Tensor]) -> Iterator[tuple[slice, Sequence[torch.Tensor]]]:
    """Which rows are decoded together, and from what."""
    count, rows = source.spec.shape[0], piece_rows(source)
    if rows == count:
        yield slice(None), parts
        return
    stored = parts[0].view(count, -1)
    for begin in range(0, count, rows):
        # A copy: what comes out may reach over them.
        yield slice(begin, min(begin + rows, count)), [stored[begin : begin + rows].clone().view(-1)]


def piece_rows(source: EncodedTensor) -> int:
    """Rows that are decoded at once; all of them where they cannot be told apart."""
    rows = source.spec.shape[0] if source.spec.shape else 1
    together = source.codec.rows_together(source.spec.shape) if len(source.parts) == 1 else rows
    if not rows or together == rows or rows % together:
        return rows
    pieces = max(1, _PIECE_BYTES // (source.nbytes // rows * together))
    return min(rows, pieces * together)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The whole recipe for one block.

    Attributes:
        sources: its tensors.
        ranges: what is read for them.
        read_plan: where that lands, from `read_offset` on.
        offsets: where each tensor ends up.
        slot_bytes: room that all of it takes while it lands.
        tensor_bytes: up to the end of the last tensor: what is needed once it has landed.
    """

    sources: tuple[Source, ...]
    ranges: tuple[FileRange, ...]
    read_plan: ReadPlan
    offsets: tuple[int, ...]
    slot_bytes: int
    read_offset: int = 0
    steps: tuple[_Step, ...] = ()

    @classmethod
    def plain(cls, ranges: Sequence[FileRange], read_plan: ReadPlan) -> "LoadPlan":
        """Nothing is decoded."""
        return cls(tuple(ranges), tuple(ranges), read_plan, read_plan.offsets, read_plan.slot_bytes)

    @property
    def payload_bytes(self) -> int:
        """What is read."""
        return self.read_plan.payload_bytes

    @property
    def tensor_bytes(self) -> int:
        return max((at + source.nbytes for at, source in zip(self.offsets, self.sources, strict=True)), default=0)

    def read_into(self, memory: memoryview) -> memoryview:
        """The part of the slot that the disk writes to."""
        return memory[self.read_offset : self.read_offset + self.read_plan.slot_bytes]

    def settle(self, memory: memoryview) -> None:
        """Make plain tensors of what has been read."""
        if not self.steps:
            return
        with torch.no_grad(), torch.inference_mode(False):
            slot = torch.frombuffer(memory, dtype=torch.uint8)
            for step in self.steps:
                step.run(slot)


def plan_load(sources: Sequence[Source], unit_bytes: int) -> LoadPlan:
    """Lay a block out in a slot that starts at a multiple of `unit_bytes`."""
    ranges = [part for source in sources for part in parts_of(source)]
    read_plan = plan_reads(ranges, unit_bytes)
    if not any(isinstance(source, EncodedTensor) for source in sources):
        return LoadPlan.plain(ranges, read_plan)
    landed = iter(read_plan.offsets)
    places = [tuple(next(landed) for _ in parts_of(source)) for source in sources]
    order = sorted(range(len(sources)), key=lambda index: min(places[index]))
    offsets, ends, end = [0] * len(sources), [], 0
    for index in order:
        offsets[index] = end
        ends.append(end + sources[index].nbytes)
        end = align_up(ends[-1])
    read_offset = align_up(max(0, *_overlaps(sources, places, order, offsets, ends)), unit_bytes)
    steps = tuple(_Step(sources[index], tuple(read_offset + at for at in places[index]), offsets[index]) for index in order)
    slot_bytes = max(read_offset + read_plan.slot_bytes, align_up(ends[-1], unit_bytes))
    return LoadPlan(tuple(sources), tuple(ranges), read_plan, tuple(offsets), slot_bytes, read_offset, steps)


def _overlaps(
    sources: Sequence[Source],
    places: Sequence[tuple[int, ...]],
    order: Sequence[int],
    offsets: Sequence[int],
    ends: Sequence[int],
) -> Iterator[int]:
    """How far below what is read each tensor would reach into what is still to be decoded, itself or a later one."""
    unread = None
    for position in range(len(order) - 1, -1, -1):
        index, end = order[position], ends[position]
        if unread is not None:
            yield end - unread
        source, first = sources[index], min(places[index])
        if isinstance(source, EncodedTensor) and piece_rows(source) < source.spec.shape[0]:
            # Rows keep pace with one another: what has been decoded is not read again.
            yield max(offsets[index] - first, end - first - source.stored_bytes)
        else:
            yield end - first
        unread = first if unread is None else min(unread, first)
