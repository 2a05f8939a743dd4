"""Which pages a layer keeps, and which of them a query sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from offload.kv.kv_block import Stretch
from offload.kv.page_layout import Pair


@dataclass(frozen=True, slots=True)
class Choice:
    """A stretch that a query sees.

    Attributes:
        allowed: which of its tokens, bool, expands to [batch, heads, queries, tokens]; None for all.
    """

    stretch: Stretch
    allowed: torch.Tensor | None = None


class LayerPolicy(Protocol):
    """What one layer of one cache remembers of a policy.

    Attributes:
        own_attention: queries see less than all, which a stock kernel cannot know.
        reads_all: every token is read in every pass, so that what comes next is known.
    """

    own_attention: bool
    reads_all: bool

    def sealed(self, stretch: Stretch, pair: Pair, stretches: Sequence[Stretch]) -> None:
        """A page is full: the last moment at which its tokens are at hand for nothing.

        Args:
            pair: of the page, with room beyond its tokens perhaps.
        """

    def dropped(self, stretches: Sequence[Stretch], length: int) -> list[Stretch]:
        """The stretches that no query will see any more."""

    def chosen(self, stretches: Sequence[Stretch], length: int, query: torch.Tensor) -> list[Choice]:
        """What a query [batch, heads, tokens, dim] sees, in the order of positions; its own tokens are among the `length`."""

    def check_truncation(self, stretches: Sequence[Stretch], length: int) -> None:
        """Raise ConfigError if what queries after position `length` see is not there any more."""

    def truncated(self, stretches: Sequence[Stretch]) -> None:
        """Only these are left."""

    def selected(self, rows: torch.Tensor) -> None:
        """The batch is these sequences of the present one now."""

    def copied(self) -> "LayerPolicy":
        """For a copy of the cache."""


class KeepAll:
    """Every query sees every token before it."""

    own_attention = False
    reads_all = True

    def sealed(self, stretch: Stretch, pair: Pair, stretches: Sequence[Stretch]) -> None:
        pass

    def dropped(self, stretches: Sequence[Stretch], length: int) -> list[Stretch]:
        return []

    def chosen(self, stretches: Sequence[Stretch], length: int, query: torch.Tensor) -> list[Choice]:
        return [Choice(stretch) for stretch in stretches]

    def check_truncation(self, stretches: Sequence[Stretch], length: int) -> None:
        pass

    def truncated(self, stretches: Sequence[Stretch]) -> None:
        pass

    def selected(self, rows: torch.Tensor) -> None:
        pass

    def copied(self) -> "LayerPolicy":
        return self
