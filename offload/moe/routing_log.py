"""What the routers of a run chose, kept small: for a trace file, and to ask what an all-knowing cache had made of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from offload.moe.streaming import RoutedRows
from offload.scheduler import routing
from offload.scheduler.expert_replay import bound
from offload.scheduler.phases import PREFILL
from offload.scheduler.routing import Routing

_MOST_BYTES = 64 << 20
"""Bytes of choices in the log; later ones are left out."""

_MOST_COMPARED = 8_000
"""Visits that the bound is computed over: about a second."""


@dataclass(frozen=True, slots=True)
class _LogEntry:
    turn: int
    phase: int
    first_step: int
    layer: int
    choices: Any
    weights: Any
    resident: frozenset[int]


@dataclass(frozen=True, slots=True)
class BeladyBound:
    """Hits in the first visits of a run: the cache's, and those of Belady's offline-optimal policy.

    Attributes:
        whole_run: True if these were all.
    """

    choices: int
    measured_hits: int
    hits: int
    whole_run: bool


class RoutingLog:
    """The visits of a session, in order.

    Args:
        model: its name.
        counts, expert_bytes: of each layer.
    """

    def __init__(self, model: str, counts: Sequence[int], expert_bytes: Sequence[int]) -> None:
        self.is_whole = True
        self._model, self._counts, self._expert_bytes = model, list(counts), list(expert_bytes)
        self._kept: list[_LogEntry] = []
        self._bytes = 0
        self._turn = -1
        self._was_prefill = False
        self._steps = [0] * len(counts)

    def note(self, visit: RoutedRows) -> None:
        prefill = visit.phase == PREFILL
        if self._turn < 0 or (prefill and not self._was_prefill):
            self._turn += 1
            self._steps = [0] * len(self._counts)
        self._was_prefill = prefill
        step = self._steps[visit.layer]
        self._steps[visit.layer] += len(visit.choices)
        if self._bytes > _MOST_BYTES:
            self.is_whole = False
            return
        choices, weights = visit.choices.astype(numpy.int16), visit.weights.astype(numpy.float32)
        self._bytes += choices.nbytes + weights.nbytes
        phase = routing.PREFILL if prefill else routing.DECODE
        self._kept.append(_LogEntry(self._turn, phase, step, visit.layer, choices, weights, visit.resident))

    def routing(self) -> Routing:
        """A visit for each token, as a trace file has them."""
        made = Routing(self._model, len(self._counts), max(self._counts), tuple(self._expert_bytes))
        for kept in self._kept:
            for row, (experts, weights) in enumerate(zip(kept.choices.tolist(), kept.weights.tolist(), strict=True)):
                resident = tuple(expert in kept.resident for expert in experts)
                step = kept.first_step + row
                made.visits.append(
                    routing.Visit(kept.turn, kept.phase, step, kept.layer, tuple(experts), tuple(weights), resident)
                )
        return made

    def bound(self, slot_count: int, minimum: int) -> BeladyBound:
        """Over passes: a pass needs all experts of a layer that its tokens chose, once."""
        made = Routing(self._model, len(self._counts), max(self._counts), tuple(self._expert_bytes))
        compared = self._kept[:_MOST_COMPARED]
        choices = hits = 0
        for step, kept in enumerate(compared):
            experts = tuple(dict.fromkeys(kept.choices.reshape(-1).tolist()))
            made.visits.append(routing.Visit(kept.turn, kept.phase, step, kept.layer, experts, (1.0,) * len(experts)))
            choices += len(experts)
            hits += len(kept.resident)
        best = bound(made, slot_count, minimum).overall.hits if compared else 0
        return BeladyBound(choices, hits, best, self.is_whole and len(compared) == len(self._kept))
