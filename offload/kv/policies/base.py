"""Which pages a layer keeps, and which of them a query sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from offload.kv.kv_block import KvBlock
from offload.kv.page_layout import KeyValue


@dataclass(frozen=True, slots=True)
class Selection:
    """A block that a query sees.

    Attributes:
        allowed: which of its tokens, bool, expands to [batch, heads, queries, tokens]; None for all.
    """

    block: KvBlock
    allowed: torch.Tensor | None = None


class LayerPolicy(Protocol):
    """What one layer of one cache remembers of a policy.

    Attributes:
        custom_attention: queries see less than all, which a stock kernel cannot know.
        reads_all: every token is read in every pass, so that what comes next is known.
    """

    custom_attention: bool
    reads_all: bool

    def sealed(self, block: KvBlock, pair: KeyValue, blocks: Sequence[KvBlock]) -> None:
        """A page is full: the last moment at which its tokens are at hand for nothing.

        Args:
            pair: of the page, with room beyond its tokens perhaps.
        """

    def evict(self, blocks: Sequence[KvBlock], length: int) -> list[KvBlock]:
        """The blocks that no query will see any more."""

    def select(self, blocks: Sequence[KvBlock], length: int, query: torch.Tensor) -> list[Selection]:
        """What a query [batch, heads, tokens, dim] sees, in the order of positions; its own tokens are among the `length`."""

    def check_truncation(self, blocks: Sequence[KvBlock], length: int) -> None:
        """Raise ConfigError if what queries after position `length` see is not there any more."""

    def truncated(self, blocks: Sequence[KvBlock]) -> None:
        """Only these are left."""

    def selected(self, rows: torch.Tensor) -> None:
        """The batch is these sequences of the present one now."""

    def copied(self) -> "LayerPolicy":
        """The policy of a copy of the cache."""


class FullAttention:
    """Every query sees every token before it."""

    custom_attention = False
    reads_all = True

    def sealed(self, block: KvBlock, pair: KeyValue, blocks: Sequence[KvBlock]) -> None:
        pass

    def evict(self, blocks: Sequence[KvBlock], length: int) -> list[KvBlock]:
        return []

    def select(self, blocks: Sequence[KvBlock], length: int, query: torch.Tensor) -> list[Selection]:
        return [Selection(block) for block in blocks]

    def check_truncation(self, blocks: Sequence[KvBlock], length: int) -> None:
        pass

    def truncated(self, blocks: Sequence[KvBlock]) -> None:
        pass

    def selected(self, rows: torch.Tensor) -> None:
        pass

    def copied(self) -> "LayerPolicy":
        return self
