"""Which experts are worth keeping: policies behind one interface, pure.

A policy ranks experts by what it saw of their use; the cache drops the lowest. A clock counts the tokens that a layer saw.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy
import numpy.typing as npt

Ranks = npt.NDArray[numpy.float64]
Choices = npt.NDArray[numpy.int64]

LRU, LFU, ADMISSION, BELADY = "lru", "lfu", "admission", "belady"
ONLINE = (LRU, LFU, ADMISSION)

_HALF_LIFE_TOKENS = 12
"""After so many tokens a use counts half. With `_LEAD`, found on the three traces of `benchmarks/experts.py`."""

_LEAD = 0.7
"""Uses by which a newcomer must be ahead of what it would displace to be worth a copy."""

MOST_ADMITTED = 1
"""Misses of a layer that are loaded in one pass, where they may be declined."""

_TAIL_TOKENS = 8 * _HALF_LIFE_TOKENS
"""Tokens of a prompt that still count at its end."""


class ExpertPolicy(Protocol):
    """Ranks experts.

    Attributes:
        ranks: [layers, experts]; the lower, the sooner it is dropped. Comparable across layers.
        declines: True if a miss may be left out of the cache.
    """

    ranks: Ranks
    declines: bool

    def note(self, layer: int, choices: Choices, weights: Ranks) -> None:
        """Tokens were routed.

        Args:
            choices: experts, [tokens, k], in the order of the tokens.
            weights: of the router, [tokens, k].
        """

    def admits(self, layer: int, newcomer: int, rank_to_beat: float) -> bool:
        """True if it pays to copy an expert into the slot of one of that rank. Asked only where it `declines`."""


class LeastRecentlyUsed:
    """Drops what was not used for longest."""

    declines = False

    def __init__(self, layers: int, experts: int) -> None:
        self.ranks = numpy.full((layers, experts), -numpy.inf)
        self._clock = 0

    def note(self, layer: int, choices: Choices, weights: Ranks) -> None:
        for token in choices[-_TAIL_TOKENS:]:
            self.ranks[layer, token] = numpy.arange(self._clock, self._clock + len(token))
            self._clock += len(token)

    def admits(self, layer: int, newcomer: int, rank_to_beat: float) -> bool:
        return True


class DecayedFrequency:
    """Drops what was used least, where a use counts half after `_HALF_LIFE_TOKENS`.

    A use counts for one on average, half of it by the router's weight: what matters more to a token is asked for again
    sooner. Ranks are kept as logarithms, on which time acts equally, so that only what is used is touched.
    """

    declines = False

    def __init__(self, layers: int, experts: int) -> None:
        self.ranks = numpy.full((layers, experts), -numpy.inf)
        self._clocks = [0] * layers

    def note(self, layer: int, choices: Choices, weights: Ranks) -> None:
        skipped = max(0, len(choices) - _TAIL_TOKENS)
        self._clocks[layer] += skipped
        for token, shares in zip(choices[skipped:], weights[skipped:], strict=True):
            self._clocks[layer] += 1
            now = self._clocks[layer] / _HALF_LIFE_TOKENS
            total = float(shares.sum())
            uses = 0.5 + 0.5 * len(token) * shares / total if total > 0 else numpy.ones(len(token))
            self.ranks[layer, token] = numpy.log2(numpy.exp2(self.ranks[layer, token] - now) + uses) + now

    def admits(self, layer: int, newcomer: int, rank_to_beat: float) -> bool:
        return True

    def _uses(self, layer: int, rank: float) -> float:
        """What a rank is worth now."""
        return math.exp2(rank - self._clocks[layer] / _HALF_LIFE_TOKENS)


class Admission(DecayedFrequency):
    """Decayed frequency that copies an expert only where it is clearly ahead of the one that it would displace.

    For misses that can be computed where they are: far fewer copies at the same hits (TinyLFU's idea, arXiv 1512.00727).
    """

    declines = True

    def admits(self, layer: int, newcomer: int, rank_to_beat: float) -> bool:
        return self._uses(layer, float(self.ranks[layer, newcomer])) > self._uses(layer, rank_to_beat) + _LEAD


class Belady:
    """Drops what will be needed last: the bound that no policy beats (Belady 1966). Knows the future.

    Args:
        uses: of each (layer, expert), the moments of its uses, rising.
        moments: of each layer's visits, in order.
    """

    declines = True

    def __init__(
        self, layers: int, experts: int, uses: Mapping[tuple[int, int], Sequence[int]], moments: Sequence[Sequence[int]]
    ) -> None:
        self.ranks = numpy.full((layers, experts), -numpy.inf)
        self._uses = {key: list(reversed(times)) for key, times in uses.items()}
        self._moments = [iter(times) for times in moments]
        for (layer, expert), times in self._uses.items():
            self.ranks[layer, expert] = -times[-1]

    def note(self, layer: int, choices: Choices, weights: Ranks) -> None:
        now = next(self._moments[layer])
        for expert in numpy.unique(choices).tolist():
            ahead = self._uses[layer, expert]
            while ahead and ahead[-1] <= now:
                ahead.pop()
            self.ranks[layer, expert] = -ahead[-1] if ahead else -numpy.inf

    def admits(self, layer: int, newcomer: int, rank_to_beat: float) -> bool:
        return bool(self.ranks[layer, newcomer] > rank_to_beat)


def make_policy(name: str, layers: int, experts: int) -> ExpertPolicy:
    """One of `ONLINE`, by name."""
    if name == LRU:
        return LeastRecentlyUsed(layers, experts)
    return DecayedFrequency(layers, experts) if name == LFU else Admission(layers, experts)
