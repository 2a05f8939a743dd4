"""A window of recent tokens, and the first ones, which attention leans on (StreamingLLM, arXiv 2309.17453)."""

from collections.abc import Sequence

import torch

from offload.kv.kv_block import KvBlock
from offload.kv.policies.base import FullAttention, Selection
from offload.kv.policies.budget import KvBudget
from offload.storage.errors import ConfigError

SINK_TOKENS = 4

_SLACK_TOKENS = 64
"""Pages are kept a little longer than they are seen, so that guessed tokens can be taken back."""


class Window(FullAttention):
    """Queries see the first tokens and the last ones; what lies between is dropped, page by page. Positions stay as they are.

    Args:
        budget: tokens that are seen, the first ones included.
    """

    custom_attention = True
    reads_all = True

    def __init__(self, budget: KvBudget) -> None:
        self._budget = budget
        self._dropped_to = 0

    def _first_recent(self, length: int) -> int:
        return max(0, length - max(1, self._budget.of(length) - SINK_TOKENS))

    def evict(self, blocks: Sequence[KvBlock], length: int) -> list[KvBlock]:
        limit = self._first_recent(length) - _SLACK_TOKENS
        gone = [block for block in blocks if block.start >= SINK_TOKENS and block.end <= limit]
        self._dropped_to = max([self._dropped_to, *(block.end for block in gone)])
        return gone

    def select(self, blocks: Sequence[KvBlock], length: int, query: torch.Tensor) -> list[Selection]:
        first = self._first_recent(length)
        choices = []
        for block in blocks:
            if block.start >= first or block.end <= SINK_TOKENS:
                choices.append(Selection(block))
            elif block.end > first or block.start < SINK_TOKENS:
                positions = torch.arange(block.start, block.end, device=query.device)
                choices.append(Selection(block, (positions >= first) | (positions < SINK_TOKENS)))
        return choices

    def check_truncation(self, blocks: Sequence[KvBlock], length: int) -> None:
        if self._dropped_to > self._first_recent(length):
            raise ConfigError(
                f"the KV cache was to go back to {length} tokens, and what its window saw there was dropped: "
                f"kv_policy='window' takes back at most {_SLACK_TOKENS} tokens"
            )

    def truncated(self, blocks: Sequence[KvBlock]) -> None:
        if not blocks:
            self._dropped_to = 0

    def copied(self) -> "Window":
        other = Window(self._budget)
        other._dropped_to = self._dropped_to
        return other
