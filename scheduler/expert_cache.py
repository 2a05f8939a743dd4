"""The experts that are in device slots: who is asked for, who comes, who goes. Events in, decisions out; nothing is copied."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy
import numpy.typing as npt

from offload.scheduler.expert_policies import ExpertPolicy


@dataclass(frozen=True, slots=True)
class Placed:
    """An expert and its slot."""

    expert: int
    slot: int


@dataclass(frozen=True, slots=True)
class Answer:
    """To a request for some experts of a layer.

    Attributes:
        hits: in their slots already, or on their way there.
        loads: to be brought into these slots, whose last holders are forgotten.
        declined: not to be brought: by choice, or for want of slots.
    """

    hits: tuple[Placed, ...]
    loads: tuple[Placed, ...]
    declined: tuple[int, ...]


class ExpertCache:
    """Slots that the experts of all layers share.

    Every layer is sure of `minimum` slots; the others go to whoever uses them best. With no others, each layer has a cache
    of its own. What a layer is computing with is never dropped.

    Args:
        layers, experts: of the model; experts of one layer.
        slot_count: at least one, and at least `minimum` for each layer.
        minimum: slots that each layer is sure of.
    """

    def __init__(self, layers: int, experts: int, slot_count: int, policy: ExpertPolicy, minimum: int = 0) -> None:
        if minimum * layers > slot_count:
            raise ValueError(f"{slot_count} slots are too few for {minimum} in each of {layers} layers")
        self.policy = policy
        self.slots = numpy.full((layers, experts), -1, dtype=numpy.int64)
        """The slot of each expert; -1 for those that have none."""
        self._minimum = minimum
        self._layer_of = numpy.full(slot_count, -1, dtype=numpy.int64)
        self._expert_of = numpy.full(slot_count, -1, dtype=numpy.int64)
        self._held = numpy.zeros(slot_count, dtype=bool)
        """In use, or to be kept for the moment."""
        self._counts = numpy.zeros(layers, dtype=numpy.int64)
        self._free = list(range(slot_count - 1, -1, -1))
        self._scanned: int | None = None

    @property
    def slot_count(self) -> int:
        return len(self._layer_of)

    def scan(self, layer: int | None) -> None:
        """A pass asks all layers for nearly all of their experts, and is at this one; None: passes ask for few again.

        In a scan what was used last is wanted last: whoever made room by rank would give up what comes next.
        """
        self._scanned = layer

    def request(
        self, layer: int, experts: Sequence[int], optional: Collection[int] = (), most_loads: int | None = None
    ) -> Answer:
        """These experts of a layer are needed now. They keep their slots until `release`.

        Args:
            experts: in the order of their need.
            optional: of them, those that may be declined, where the policy does that.
            most_loads: more are declined.
        """
        slots = self.slots[layer]
        hits = [Placed(expert, int(slots[expert])) for expert in experts if slots[expert] >= 0]
        for placed in hits:
            self._held[placed.slot] = True
        loads: list[Placed] = []
        declined: list[int] = []
        for expert in (expert for expert in experts if slots[expert] < 0):
            full = most_loads is not None and len(loads) >= most_loads
            slot = None if full else self._slot_for(layer, expert, expert in optional and self.policy.declines)
            if slot is None:
                declined.append(expert)
            else:
                self._give(slot, layer, expert)
                loads.append(Placed(expert, slot))
        return Answer(tuple(hits), tuple(loads), tuple(declined))

    def room(self, layer: int) -> int:
        """Slots that the layer could have all at once."""
        free = min(len(self._free), max(0, self._minimum - int(self._counts[layer])))
        free = max(free, len(self._free) - self._reserved_for_others(layer))
        may_go = numpy.bincount(self._layer_of[(self._layer_of >= 0) & ~self._held], minlength=len(self._counts))
        others = numpy.minimum(may_go, numpy.maximum(0, self._counts - self._minimum))
        return int(free + may_go[layer] + others.sum() - others[layer])

    def borrow(self, layer: int, count: int) -> list[int]:
        """Slots without an expert, to pass others through; as many as there are, at most `count`. `give_back` ends it."""
        slots: list[int] = []
        while len(slots) < count and (slot := self._slot_for(layer, -1, False)) is not None:
            self._layer_of[slot], self._held[slot] = layer, True
            self._counts[layer] += 1
            slots.append(slot)
        return slots

    def give_back(self, slots: Iterable[int]) -> None:
        """Borrowed slots are free again."""
        for slot in slots:
            self._counts[self._layer_of[slot]] -= 1
            self._layer_of[slot], self._held[slot] = -1, False
            self._free.append(slot)

    def release(self, slots: Iterable[int]) -> None:
        """The layer has computed with what is in these slots."""
        for slot in slots:
            self._held[slot] = False

    def drop(self, layer: int, expert: int) -> None:
        """What is in the expert's slot is not, or no longer, that expert."""
        slot = int(self.slots[layer, expert])
        if slot >= 0:
            self._take(slot)
            self._free.append(slot)

    def holder(self, slot: int) -> tuple[int, int]:
        """Layer and expert of a slot; -1 for a free one."""
        return int(self._layer_of[slot]), int(self._expert_of[slot])

    def _slot_for(self, layer: int, expert: int, may_decline: bool) -> int | None:
        if self._free and (self._counts[layer] < self._minimum or len(self._free) > self._reserved_for_others(layer)):
            return self._free.pop()
        victim = self._victim(layer)
        if victim is None:
            return None
        rank = float(self.policy.ranks[self._layer_of[victim], self._expert_of[victim]])
        if may_decline and not self.policy.admits(layer, expert, rank):
            return None
        self._take(victim)
        return victim

    def _reserved_for_others(self, layer: int) -> int:
        missing = numpy.maximum(0, self._minimum - self._counts)
        return int(missing.sum() - missing[layer])

    def _victim(self, layer: int) -> int | None:
        """The slot of the lowest rank that may go: the layer's own, or of a layer that has more than it is sure of."""
        candidates = self._candidates(layer)
        if not len(candidates):
            return None
        if self._scanned is not None:
            candidates = self._behind(candidates, self._scanned)
        ranks = self.policy.ranks[self._layer_of[candidates], self._expert_of[candidates]]
        return int(candidates[numpy.argmin(ranks)])

    def _behind(self, candidates: npt.NDArray[numpy.int64], at: int) -> npt.NDArray[numpy.int64]:
        """Those of the layer that gives up next: of the layers that a scan will be at last, the one that has most.

        So every layer lacks about as many, and the link is as busy under one layer as under the next.
        """
        layers = self._layer_of[candidates]
        distance = (layers - at) % len(self._counts)
        far = distance >= min(len(self._counts) // 2, int(distance.max()))
        order = self._counts[layers] * len(self._counts) + distance
        chosen: npt.NDArray[numpy.int64] = candidates[far & (order == order[far].max())]
        return chosen

    def _candidates(self, layer: int) -> npt.NDArray[numpy.int64]:
        """Slots whose experts may go to make room for the layer."""
        occupied = (self._layer_of >= 0) & ~self._held
        return numpy.flatnonzero(occupied & ((self._layer_of == layer) | (self._counts[self._layer_of] > self._minimum)))

    def _give(self, slot: int, layer: int, expert: int) -> None:
        self._layer_of[slot], self._expert_of[slot] = layer, expert
        self._held[slot] = True
        self._counts[layer] += 1
        self.slots[layer, expert] = slot

    def _take(self, slot: int) -> None:
        layer, expert = self.holder(slot)
        self.slots[layer, expert] = -1
        self._layer_of[slot] = self._expert_of[slot] = -1
        self._held[slot] = False
        self._counts[layer] -= 1
