"""How a block comes to lie in a slot as plain tensors: what is read, and what is decoded then. Pure but for `decode`.

What is stored in fewer bytes comes to the end of the slot, and is decoded from there to its beginning, some rows after others:
a slot takes hardly more than the plain tensors, and no buffer beside it but for those rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from offload.storage.blocks import FileRange, align_up
from offload.storage.codecs.weights import EncodedTensor, Source, parts_of
from offload.storage.native.library import library
from offload.storage.read_plan import ReadPlan, plan_reads

_PIECE_BYTES = 1 << 19
"""Values that are decoded at once: more would take more memory beside the slot."""

CARD_PIECE_BYTES = 8 << 20
"""The same on a card, where each operation costs some microseconds."""

DECODE_WORKSPACE = 8
"""What decoding takes of a card's memory meanwhile, in pieces: its bytes, and a few times its values in fp32."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One tensor: where its parts lie in what was read, and where it goes."""

    source: Source
    places: tuple[int, ...]
    offset: int

    def run(self, slot: torch.Tensor, stored: torch.Tensor, gap: int | None) -> None:
        """Make the tensor.

        Args:
            gap: bytes from the beginning of the slot to that of `stored`, which is a part of it; None where it is not.
        """
        source, out = self.source, slot[self.offset : self.offset + self.source.nbytes]
        parts = [stored[at : at + part.nbytes] for at, part in zip(self.places, parts_of(source), strict=True)]
        if not isinstance(source, EncodedTensor):
            out.copy_(parts[0])
            return
        values = out.view(getattr(torch, source.spec.dtype)).view(source.spec.shape)
        for rows, piece in _pieces(source, parts, None if gap is None else gap + self.places[0] - self.offset):
            source.codec.decode(piece, values[rows])


def decoded_pieces(source: EncodedTensor, parts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Decode a tensor some rows at a time.

    Args:
        parts: what its ranges hold, uint8.
    """
    for rows, stored in _pieces(source, parts, None, _PIECE_BYTES):
        count = (rows.stop or source.spec.shape[0]) - (rows.start or 0)
        values = torch.empty((count, *source.spec.shape[1:]), dtype=getattr(torch, source.spec.dtype))
        source.codec.decode(stored, values)
        yield values


def _pieces(
    source: EncodedTensor, parts: Sequence[torch.Tensor], gap: int | None, most_bytes: int | None = None
) -> Iterator[tuple[slice, Sequence[torch.Tensor]]]:
    """Which rows are decoded together, and from what.

    Args:
        gap: bytes from where the first value goes to where its bytes are, which later ones may reach over; None if none do.
        most_bytes: of the values of one piece; by default as many as the decoder takes at once.
    """
    count, least = source.spec.shape[0] if source.spec.shape else 1, piece_rows(source)
    if least == count:
        yield slice(None), parts
        return
    on_card, stored, row_bytes = parts[0].device.type != "cpu", parts[0].view(count, -1), source.nbytes // count
    if on_card:
        least = most = piece_rows(source, CARD_PIECE_BYTES)
    else:
        most = count if most_bytes is None and library() is not None else least
    together, begin = source.codec.rows_together(source.spec.shape), 0
    while begin < count:
        ahead = count * row_bytes if gap is None else gap - begin * (row_bytes - stored.shape[1])
        clear = min(max(0, ahead) // row_bytes // together * together, most)
        # Where the values of even a small piece would reach over its bytes, it is decoded from a copy.
        rows = slice(begin, min(begin + max(clear, least), count))
        yield rows, [(stored[rows].clone() if clear < least else stored[rows]).view(-1)]
        begin = rows.stop


def piece_rows(source: EncodedTensor, piece_bytes: int = _PIECE_BYTES) -> int:
    """Rows that are decoded at once; all of them where they cannot be told apart."""
    rows = source.spec.shape[0] if source.spec.shape else 1
    together = source.codec.rows_together(source.spec.shape) if len(source.parts) == 1 else rows
    if not rows or together == rows or rows % together:
        return rows
    pieces = max(1, piece_bytes // (source.nbytes // rows * together))
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

    @property
    def device_slot_bytes(self) -> int:
        """The part of the slot that is written to where only what was read is copied there, and then decoded."""
        return max(self.tensor_bytes, self.read_offset + self.stored.tensor_bytes)

    @property
    def stored(self) -> "LoadPlan":
        """The recipe for the bytes as they are in files, in memory of their own."""
        return LoadPlan.plain(self.ranges, self.read_plan) if self.steps else self

    def stored_part(self, slot: torch.Tensor) -> torch.Tensor:
        """Where in a slot (uint8) the stored bytes go, to be decoded there."""
        return slot[self.read_offset : self.read_offset + self.stored.tensor_bytes]

    def read_into(self, memory: memoryview) -> memoryview:
        """The part of the slot that the disk writes to."""
        return memory[self.read_offset : self.read_offset + self.read_plan.slot_bytes]

    def decode(self, slot: torch.Tensor, stored: torch.Tensor | None = None) -> None:
        """Make plain tensors in the slot.

        Args:
            slot: uint8.
            stored: what has been read; None where it lies in the slot.
        """
        if not self.steps:
            return
        with torch.no_grad(), torch.inference_mode(False):
            for step in self.steps:
                if stored is None:
                    step.run(slot, slot[self.read_offset :], self.read_offset)
                else:
                    step.run(slot, stored, None)


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
    steps = tuple(_Step(sources[index], places[index], offsets[index]) for index in order)
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
