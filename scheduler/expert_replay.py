"""What a cache would have made of a recorded run: policies compared on the same choices, beside the best there is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy

from offload.scheduler.expert_cache import ExpertCache
from offload.scheduler.expert_policies import BELADY, MOST_ADMITTED, ONLINE, Belady, ExpertPolicy, make_policy
from offload.scheduler.routing import DECODE, Routing, Visit
from offload.storage.errors import ConfigError

POLICIES = (*ONLINE, BELADY)
SCOPES = ("global", "layer")


@dataclass(slots=True)
class Tally:
    """What became of some visits.

    Attributes:
        choices: experts asked for.
        hits: of them, those that were there.
        copies: experts brought into the cache.
        copied_bytes: theirs.
        missed_bytes: of all that was not there, copied or not.
    """

    choices: int = 0
    hits: int = 0
    copies: int = 0
    copied_bytes: int = 0
    missed_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.choices if self.choices else 0.0

    def add(self, choices: int, hits: int, copies: int, expert_bytes: int) -> None:
        self.choices += choices
        self.hits += hits
        self.copies += copies
        self.copied_bytes += copies * expert_bytes
        self.missed_bytes += (choices - hits) * expert_bytes


@dataclass(slots=True)
class Replay:
    """What one policy made of a recorded run.

    Attributes:
        overall: of all visits.
        decode: of those of new tokens.
        warm: of the second half of the run.
    """

    policy: str
    slot_count: int
    overall: Tally = field(default_factory=Tally)
    decode: Tally = field(default_factory=Tally)
    warm: Tally = field(default_factory=Tally)


def slots_in(routing: Routing, budget_bytes: int) -> int:
    """Slots, each as large as the largest expert.

    Raises:
        ConfigError: if the trace does not tell how large they are, or not one fits.
    """
    largest = max(routing.expert_bytes)
    if not largest:
        raise ConfigError("the trace does not tell how large an expert is; give --slots-per-layer instead of --budget")
    if budget_bytes < largest:
        raise ConfigError(f"the budget of {budget_bytes:,} bytes is smaller than one expert of {largest:,}")
    return budget_bytes // largest


def replay(routing: Routing, policy: str, slot_count: int, scope: str = "global") -> Replay:
    """Send the recorded choices through a cache of `slot_count` slots.

    Args:
        policy: one of `POLICIES`. `admission` declines misses, which are then computed where they are; `belady` declines
            what is not worth a slot; the others bring every miss.
        scope: `global`: a layer is sure of as many slots as a token takes, where there are enough, and the rest is shared;
            `layer`: every layer has the same part for itself.
    """
    chosen = max(len(visit.experts) for visit in routing.visits)
    share = slot_count // routing.layers
    minimum = share if scope == "layer" else min(share, chosen)
    count = share * routing.layers if scope == "layer" else slot_count
    if not count:
        raise ConfigError(f"{slot_count} slots are too few for {routing.layers} layers")
    if policy == BELADY:
        return bound(routing, count, minimum)
    made = make_policy(policy, routing.layers, routing.experts)
    cache = ExpertCache(routing.layers, routing.experts, count, made, minimum)
    return _tallied(routing, policy, count, lambda visit: _ask(cache, visit))


def bound(routing: Routing, slot_count: int, minimum: int) -> Replay:
    """What an all-knowing cache finds, whose layers are each sure of `minimum` slots (Belady).

    Of what is there and what is asked for, the slots keep what is needed soonest: even what was asked for just now may go.
    """
    uses: dict[tuple[int, int], list[int]] = {}
    moments: list[list[int]] = [[] for _ in range(routing.layers)]
    for moment, visit in enumerate(routing.visits):
        moments[visit.layer].append(moment)
        for expert in visit.experts:
            uses.setdefault((visit.layer, expert), []).append(moment)
    policy = Belady(routing.layers, routing.experts, uses, moments)
    cache = ExpertCache(routing.layers, routing.experts, slot_count, policy, minimum)

    def ask(visit: Visit) -> tuple[int, int]:
        there = [expert for expert in visit.experts if cache.slots[visit.layer, expert] >= 0]
        _note(policy, visit)
        missing = sorted(set(visit.experts) - set(there), key=lambda expert: -policy.ranks[visit.layer, expert])
        answer = cache.request(visit.layer, missing, optional=missing)
        cache.release(placed.slot for placed in answer.loads)
        return len(there), len(answer.loads)

    return _tallied(routing, BELADY, slot_count, ask)


def _ask(cache: ExpertCache, visit: Visit) -> tuple[int, int]:
    """Hits and copies of one visit; where there are fewer slots than choices, one lot after another."""
    _note(cache.policy, visit)
    optional = visit.experts if cache.policy.declines else ()
    left: Sequence[int] = list(dict.fromkeys(visit.experts))
    if optional:
        left = sorted(left, key=lambda expert: -cache.policy.ranks[visit.layer, expert])
    hits = copies = 0
    while left:
        answer = cache.request(visit.layer, left, optional, MOST_ADMITTED if optional else None)
        cache.release(placed.slot for placed in (*answer.hits, *answer.loads))
        hits += len(answer.hits)
        copies += len(answer.loads)
        left = answer.declined if not optional else ()
    return hits, copies


def _note(policy: ExpertPolicy, visit: Visit) -> None:
    policy.note(visit.layer, numpy.array([visit.experts]), numpy.array([visit.weights], dtype=float))


def _tallied(routing: Routing, policy: str, slot_count: int, ask: Callable[[Visit], tuple[int, int]]) -> Replay:
    result = Replay(policy, slot_count)
    tokens = sorted({(visit.turn, visit.step) for visit in routing.visits})
    second_half = tokens[len(tokens) // 2]
    for visit in routing.visits:
        hits, copies = ask(visit)
        tallies = [result.overall]
        tallies += [result.decode] if visit.phase == DECODE else []
        tallies += [result.warm] if (visit.turn, visit.step) >= second_half else []
        for tally in tallies:
            tally.add(len(set(visit.experts)), hits, copies, routing.expert_bytes[visit.layer])
    return result
