"""Retrieval: all pages are kept, on whatever tier, and a query sees those that it is likely to attend to.

Each few tokens have bounds, the least and the largest of their keys in every channel, from which follows the largest product
that a query could have with one of them (Quest, arXiv 2406.10774). Pages are chosen by it, for each sequence; nothing is
deleted, so that a later query can want what earlier ones did not. ShadowKV's landmarks (arXiv 2410.21465), means with pages of
outliers beside them, were tried first: they found fewer facts (docs/kv.md).
"""

from collections.abc import Sequence

import torch

from offload.kv.kv_block import KvBlock
from offload.kv.page_layout import KeyValue
from offload.kv.policies.base import FullAttention, Selection
from offload.kv.policies.budget import KvBudget

CHUNK_TOKENS = 4
"""Tokens that share bounds."""

INDEX_SHARE = 0.5 / CHUNK_TOKENS
"""The index, as a share of the cache: two bounds in 8 bits for each 16-bit key of a chunk, and values have none."""

_PAGES = 64
_LARGEST_PAGE_TOKENS = 32

_RECENT_SHARE = 8
"""The part of the budget that the last tokens have."""

_CODE = torch.float8_e4m3fn


def page_tokens(total_tokens: int) -> int:
    """So few that there is something to choose among; no fewer than a chunk."""
    return max(CHUNK_TOKENS, min(_LARGEST_PAGE_TOKENS, total_tokens // _PAGES))


class Retrieve(FullAttention):
    """Queries see the first page, the last ones, and those whose bounds promise the most, of each sequence by itself.

    Args:
        budget: tokens that are seen in all.
    """

    custom_attention = True
    reads_all = False

    def __init__(self, budget: KvBudget) -> None:
        self._budget = budget
        self._starts: list[int] = []
        """Where those pages begin that have bounds."""
        self._chunks: list[int] = []
        """How many chunks each of them has."""
        self._owners: torch.Tensor | None = None
        """int64 [chunks]: the index of the page of each chunk, beside the bounds."""
        self._bounds: torch.Tensor | None = None
        """[2, batch, heads, chunks, key dim]: least and largest."""

    def sealed(self, block: KvBlock, pair: KeyValue, blocks: Sequence[KvBlock]) -> None:
        chunks = pair.keys[:, :, : block.tokens].split(CHUNK_TOKENS, dim=2)
        bounds = torch.stack([torch.stack([chunk.amin(dim=2), chunk.amax(dim=2)]) for chunk in chunks], dim=3)
        limit = torch.finfo(_CODE).max
        bounds = bounds.clamp(-limit, limit).to(_CODE)
        owners = torch.full((len(chunks),), len(self._starts), device=bounds.device)
        self._starts.append(block.start)
        self._chunks.append(len(chunks))
        self._owners = owners if self._owners is None else torch.cat([self._owners, owners])
        if self._bounds is not None:
            bounds = torch.cat([self._bounds.view(torch.uint8), bounds.view(torch.uint8)], dim=3).view(_CODE)
        self._bounds = bounds

    def select(self, blocks: Sequence[KvBlock], length: int, query: torch.Tensor) -> list[Selection]:
        room = self._budget.of(length)
        always = {0} if blocks and blocks[0].start == 0 else set()
        index = len(blocks)
        # The tokens of the query itself are seen by it, however many they are.
        recent = max(1, room // _RECENT_SHARE, query.shape[2])
        while index and recent > 0:
            index -= 1
            recent -= blocks[index].tokens
            always.add(index)
        room -= sum(blocks[index].tokens for index in always)
        places = {block.start: place for place, block in enumerate(blocks)}
        numbered = ((number, places.get(start)) for number, start in enumerate(self._starts))
        candidates = [(number, place) for number, place in numbered if place is not None and place not in always]
        allowed = self._wanted(blocks, candidates, room, query) if candidates and room > 0 else {}
        return [
            Selection(block, None if place in always else allowed[place])
            for place, block in enumerate(blocks)
            if place in always or place in allowed
        ]

    def _wanted(
        self, blocks: Sequence[KvBlock], candidates: Sequence[tuple[int, int]], room: int, query: torch.Tensor
    ) -> dict[int, torch.Tensor | None]:
        """Which pages each sequence sees besides: place in `blocks` -> bool [batch, 1, 1, 1], None for all."""
        sizes = [blocks[place].tokens for _, place in candidates]
        if sum(sizes) <= room:
            return {place: None for _, place in candidates}
        count = min(len(candidates), room // max(sizes))
        if not count:
            return {}
        numbers = torch.tensor([number for number, _ in candidates]).to(query.device, non_blocking=True)
        best = self._page_scores(query)[:, numbers].topk(count, dim=1).indices
        seen = torch.zeros(len(query), len(candidates), dtype=torch.bool, device=query.device).scatter(1, best, True)
        used = seen.any(dim=0).tolist()
        return {place: seen[:, index].view(-1, 1, 1, 1) for index, (_, place) in enumerate(candidates) if used[index]}

    def _page_scores(self, query: torch.Tensor) -> torch.Tensor:
        """[batch, pages]: the largest share of attention that any head and token of the query could give one of its chunks."""
        assert self._bounds is not None
        assert self._owners is not None
        batch, _, _, dim = query.shape
        least, largest = self._bounds.float()
        grouped = query.float().reshape(batch, least.shape[1], -1, dim)
        products = grouped.relu() @ largest.transpose(-1, -2) - (-grouped).relu() @ least.transpose(-1, -2)
        shares = (products * dim**-0.5).softmax(dim=-1).amax(dim=(1, 2))
        owners = self._owners.expand(batch, -1)
        return torch.zeros(batch, len(self._starts), device=query.device).scatter_reduce(1, owners, shares, "amax")

    def truncated(self, blocks: Sequence[KvBlock]) -> None:
        last = blocks[-1].start if blocks else -1
        # Only pages at the end go. One that was cut keeps its bounds, which promise no less than what is left.
        count = sum(start <= last for start in self._starts)
        self._starts, self._chunks = self._starts[:count], self._chunks[:count]
        if self._bounds is None or self._owners is None or not count:
            self._bounds = self._owners = None
        else:
            chunks = sum(self._chunks)
            self._bounds, self._owners = self._bounds[:, :, :, :chunks], self._owners[:chunks]

    def selected(self, rows: torch.Tensor) -> None:
        if self._bounds is not None:
            self._bounds = self._bounds.view(torch.uint8).index_select(1, rows).view(_CODE)

    def copied(self) -> "Retrieve":
        other = Retrieve(self._budget)
        other._starts, other._chunks = list(self._starts), list(self._chunks)
        other._owners, other._bounds = self._owners, self._bounds
        return other
