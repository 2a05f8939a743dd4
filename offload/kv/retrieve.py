"""Retrieval: all pages are kept, on whatever tier, and a query sees those that it is likely to attend to.

After ShadowKV (arXiv 2410.21465): each few tokens have a landmark, the mean of their keys; a query's products with the
landmarks tell which pages it wants. Pages whose keys are unlike their landmark (outliers) are always seen. Nothing is deleted,
so that a later query can want what earlier ones did not.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as functional

from offload.kv.budget import KvBudget
from offload.kv.policy import Choice, KeepAll
from offload.kv.shape import Pair
from offload.kv.store import Stretch

CHUNK_TOKENS = 4
"""That share a landmark. The landmarks take an eighth of the cache, in device memory."""

_RECENT_SHARE = 4
"""The part of the budget that the last tokens have."""

_OUTLIER_SHARE = 8
"""The part of the budget that pages have which no landmark speaks for."""


class Retrieve(KeepAll):
    """Queries see the first page, the last ones, outliers, and what their landmarks say, of each sequence by itself.

    Args:
        budget: tokens that are seen in all.
    """

    own_attention = True
    reads_all = False

    def __init__(self, budget: KvBudget) -> None:
        self._budget = budget
        self._starts: list[int] = []
        """Where those pages begin that have landmarks."""
        self._chunk_page: list[int] = []
        """The index of the page of each landmark."""
        self._landmarks: torch.Tensor | None = None
        """[batch, heads, chunks, key dim]."""
        self._likeness: torch.Tensor | None = None
        """[batch, pages]: cosine of the key that is least like its landmark."""

    def sealed(self, stretch: Stretch, pair: Pair, stretches: Sequence[Stretch]) -> None:
        keys = pair.keys[:, :, : stretch.tokens]
        chunks = keys.split(CHUNK_TOKENS, dim=2)
        landmarks = torch.stack([chunk.float().mean(dim=2) for chunk in chunks], dim=2)
        alike = [
            functional.cosine_similarity(chunk.float(), landmarks[:, :, index : index + 1], dim=-1).amin(dim=-1)
            for index, chunk in enumerate(chunks)
        ]
        likeness = torch.stack(alike, dim=-1).amin(dim=(1, 2)).unsqueeze(1)
        self._chunk_page += [len(self._starts)] * len(chunks)
        self._starts.append(stretch.start)
        landmarks = landmarks.to(keys.dtype)
        if self._landmarks is None or self._likeness is None:
            self._landmarks, self._likeness = landmarks, likeness
        else:
            self._landmarks = torch.cat([self._landmarks, landmarks], dim=2)
            self._likeness = torch.cat([self._likeness, likeness], dim=1)

    def chosen(self, stretches: Sequence[Stretch], length: int, query: torch.Tensor) -> list[Choice]:
        room = self._budget.of(length)
        always: set[int] = set()
        always.update(index for index, stretch in enumerate(stretches) if stretch.start == 0)
        recent, index = max(1, room // _RECENT_SHARE), len(stretches)
        # The tokens of the query itself are seen by it, however many they are.
        recent = max(recent, query.shape[2])
        while index and recent > 0:
            index -= 1
            recent -= stretches[index].tokens
            always.add(index)
        room -= sum(stretches[index].tokens for index in always)
        places = {stretch.start: place for place, stretch in enumerate(stretches)}
        numbered = ((number, places.get(start)) for number, start in enumerate(self._starts))
        candidates = [(number, place) for number, place in numbered if place is not None and place not in always]
        allowed = self._wanted(stretches, candidates, room, query) if candidates and room > 0 else {}
        return [
            Choice(stretch, None if place in always else allowed[place])
            for place, stretch in enumerate(stretches)
            if place in always or place in allowed
        ]

    def _wanted(
        self, stretches: Sequence[Stretch], candidates: Sequence[tuple[int, int]], room: int, query: torch.Tensor
    ) -> dict[int, torch.Tensor]:
        """Which pages each sequence sees besides: place in `stretches` -> bool [batch, 1, 1, 1]."""
        assert self._landmarks is not None
        assert self._likeness is not None
        numbers = torch.tensor([number for number, _ in candidates], device=query.device)
        sizes = [stretches[place].tokens for _, place in candidates]
        count = min(len(candidates), max(0, room // max(sizes)))
        if not count:
            return {}
        scores = self._page_scores(query)[:, numbers]
        outliers = min(count, room // _OUTLIER_SHARE // max(sizes))
        if outliers:
            unlike = self._likeness[:, numbers].topk(outliers, dim=1, largest=False).indices
            scores = scores.scatter(1, unlike, torch.inf)
        seen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(count, dim=1).indices, True)
        used = seen.any(dim=0).tolist()
        return {place: seen[:, index].view(-1, 1, 1, 1) for index, (_, place) in enumerate(candidates) if used[index]}

    def _page_scores(self, query: torch.Tensor) -> torch.Tensor:
        """[batch, pages]: the largest share of attention that any head and token of the query would give a landmark of it."""
        assert self._landmarks is not None
        batch, _, _, dim = query.shape
        landmarks = self._landmarks.float()
        grouped = query.float().reshape(batch, landmarks.shape[1], -1, dim)
        shares = (grouped @ landmarks.transpose(-1, -2) * dim**-0.5).softmax(dim=-1)
        best = shares.amax(dim=(1, 2))
        owners = torch.tensor(self._chunk_page, device=query.device).expand(batch, -1)
        return torch.zeros(batch, len(self._starts), device=query.device).scatter_reduce(1, owners, best, "amax")

    def truncated(self, stretches: Sequence[Stretch]) -> None:
        last = stretches[-1].start if stretches else -1
        # Only pages at the end go.
        count = sum(start <= last for start in self._starts)
        chunks = sum(page < count for page in self._chunk_page)
        self._starts, self._chunk_page = self._starts[:count], self._chunk_page[:chunks]
        if not count:
            self._landmarks = self._likeness = None
        elif self._landmarks is not None and self._likeness is not None:
            self._landmarks, self._likeness = self._landmarks[:, :, :chunks], self._likeness[:, :count].clone()
            if self._starts[-1] == last:
                # Its landmarks speak for tokens that are gone, perhaps: it is seen whatever they say.
                self._likeness[:, -1] = -torch.inf

    def selected(self, rows: torch.Tensor) -> None:
        if self._landmarks is not None and self._likeness is not None:
            self._landmarks = self._landmarks.index_select(0, rows)
            self._likeness = self._likeness.index_select(0, rows)

    def copied(self) -> "Retrieve":
        other = Retrieve(self._budget)
        other._starts, other._chunk_page = list(self._starts), list(self._chunk_page)
        other._landmarks, other._likeness = self._landmarks, self._likeness
        return other
