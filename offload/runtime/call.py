"""What one call of the model is."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from offload.scheduler.phases import DECODE, PREFILL


class CallKind(Enum):
    """What a pass is for."""

    PREFILL = "prefill"
    """It reads a prompt, or a chunk of one; a forward pass of training is one, too."""
    DECODE = "decode"
    """It adds to what a cache holds."""
    DRAFT = "draft"
    """It guesses tokens that another pass will verify."""
    VERIFY = "verify"
    """It checks tokens that were guessed."""
    PARTIAL = "partial"
    """It runs some of the model's layers only."""

    @property
    def phase(self) -> str:
        """The phase that its time is charged to."""
        return PREFILL if self in (CallKind.PREFILL, CallKind.PARTIAL) else DECODE


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of a pass.

    Attributes:
        id: stands for the sequence; its place in the batch, where nobody named it.
        length: positions that the cache holds of it before the pass.
        positions: that the pass adds.
    """

    id: int
    length: int
    positions: int


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the whole model.

    Attributes:
        rows: the sequences; none where several micro-batches make one pass, each with rows of its own.
        cache: as passed to the model, of transformers; after the pass the one that it returned; None without one.
        cache_bytes: what the cache held before the pass.
        continues: it goes on with a prompt that earlier passes began.
        keeps_cache: keys and values of the pass are kept.
    """

    kind: CallKind
    rows: tuple[Row, ...] = ()
    cache: Any = None
    cache_bytes: int = 0
    continues: bool = False
    keeps_cache: bool = True

    @property
    def batch_size(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Positions that the longest row adds."""
        return max((row.positions for row in self.rows), default=0)

    @property
    def cached_tokens(self) -> int:
        """Positions that the cache holds of the longest row."""
        return max((row.length for row in self.rows), default=0)
