"""How an optimizer's work is taken apart: sub-groups of a block's parameters, and where their states lie in a file.

After ZeRO-Infinity's sub-groups (arXiv 2104.07857), cut at the borders of parameters or at multiples of 4,096 elements:
fused kernels give other bits for smaller pieces.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES, DTYPE_BYTES, BlockKey, align_up

PIECE_ELEMENTS = 4096
"""Pieces of a parameter begin at multiples of this."""

MASTER = "master"
"""The state that the optimizer steps where the weight itself has another dtype."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A parameter that is trained: its name, elements, and torch's name of its dtype."""

    name: str
    elements: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `start` to `stop` of a parameter."""

    parameter: Trained
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Moment:
    """A state of an optimizer.

    Attributes:
        dtype: torch's name; None for that of what is stepped.
        each: elements of the parameter that share one of the state.
    """

    name: str
    dtype: str | None = None
    each: int = 1


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """Where one tensor lies in a region.

    Attributes:
        kind: of a state, like `exp_avg`; empty for the weight itself.
        offset: in the region, in bytes.
        each: elements of the piece that share one of the tensor.
    """

    kind: str
    piece: Piece
    dtype: str
    offset: int
    each: int = 1

    @property
    def nbytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * -(-(self.piece.stop - self.piece.start) // self.each)


@dataclass(frozen=True, slots=True)
class Region:
    """Neighbouring bytes of a file, or of memory that is laid out like it; aligned for O_DIRECT."""

    offset: int
    nbytes: int
    spans: tuple[TensorSpan, ...]


@dataclass(frozen=True, slots=True)
class SubGroup:
    """What is updated at once: pieces of one block's parameters, all of one dtype.

    Attributes:
        weights: where the new weights go.
        states: where optimizer state lie.
    """

    block: BlockKey
    pieces: tuple[Piece, ...]
    weights: Region = field(default=Region(0, 0, ()))
    states: Region = field(default=Region(0, 0, ()))

    @property
    def elements(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)

    @property
    def owns_master(self) -> bool:
        """What the optimizer steps is a state of its own, and the weight is rounded from it."""
        return any(span.kind == MASTER for span in self.states.spans)


@dataclass(frozen=True, slots=True)
class StateLayout:
    """All sub-groups, in the order in which the model computes their blocks, and the bytes of a file that holds them."""

    groups: tuple[SubGroup, ...]
    nbytes: int

    @property
    def state_bytes(self) -> int:
        return sum(group.states.nbytes for group in self.groups)

    @property
    def weight_bytes(self) -> int:
        return sum(group.weights.nbytes for group in self.groups)

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest sub-group: weights and states."""
        return max((group.weights.nbytes + group.states.nbytes for group in self.groups), default=0)

    def of(self, block: BlockKey) -> tuple[SubGroup, ...]:
        return tuple(group for group in self.groups if group.block == block)

    @property
    def written_bytes(self) -> int:
        """To disk, in a step, where states and weights live there."""
        return self.state_bytes + self.weight_bytes


def lay_out(
    blocks: Sequence[tuple[BlockKey, Sequence[Trained]]],
    moments: Sequence[Moment],
    master_dtype: str | None,
    most_elements: int,
) -> StateLayout:
    """Cut the blocks' parameters into sub-groups of at most `most_elements`, and give each its place.

    A block's weights lie one after another, as they are streamed; then its states, a region for each sub-group.

    Args:
        moments: optimizer state.
        master_dtype: of a copy that is stepped instead of a weight of fewer bytes; None to step the weights.
    """
    placed: list[SubGroup] = []
    end = 0
    for block, parameters in blocks:
        groups = [SubGroup(block, pieces) for pieces in _cut(parameters, align_pieces(most_elements))]
        with_weights = []
        for group in groups:
            spans, size = _spans(group.pieces, [Moment("", group.pieces[0].parameter.dtype)], "")
            with_weights.append((group, Region(end, size, spans)))
            end += size
        for group, weights in with_weights:
            own = group.pieces[0].parameter.dtype
            finer = master_dtype is not None and DTYPE_BYTES[master_dtype] > DTYPE_BYTES[own]
            stepped = master_dtype if finer and master_dtype is not None else own
            kinds = [Moment(MASTER)] if stepped != own else []
            spans, size = _spans(group.pieces, [*kinds, *moments], stepped)
            placed.append(SubGroup(block, group.pieces, weights, Region(end, size, spans)))
            end += size
    return StateLayout(tuple(placed), end)


def align_pieces(elements: int) -> int:
    """The nearest size of a piece that is not larger."""
    return max(PIECE_ELEMENTS, elements // PIECE_ELEMENTS * PIECE_ELEMENTS)


def _cut(parameters: Sequence[Trained], most_elements: int) -> Iterator[tuple[Piece, ...]]:
    together: list[Piece] = []
    for parameter in parameters:
        held = sum(piece.stop for piece in together)
        if together and (held + parameter.elements > most_elements or together[0].parameter.dtype != parameter.dtype):
            yield tuple(together)
            together = []
        if parameter.elements <= most_elements:
            together.append(Piece(parameter, 0, parameter.elements))
            continue
        for start in range(0, parameter.elements, most_elements):
            yield (Piece(parameter, start, min(start + most_elements, parameter.elements)),)
    if together:
        yield tuple(together)


def _spans(pieces: Sequence[Piece], kinds: Sequence[Moment], stepped: str) -> tuple[tuple[TensorSpan, ...], int]:
    spans: list[TensorSpan] = []
    end = 0
    for kind in kinds:
        for piece in pieces:
            spans.append(TensorSpan(kind.name, piece, kind.dtype or stepped, end, kind.each))
            end = align_up(end + spans[-1].nbytes)
    return tuple(spans), align_up(end, BLOCK_ALIGNMENT_BYTES)
