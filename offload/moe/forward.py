"""One call of one layer's experts: those that it needs are in slots, on their way there, or pass through a few lanes."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch

from offload.model.experts import ExpertsUnit
from offload.moe.slots import ExpertSlots
from offload.scheduler.expert_cache import ExpertCache
from offload.scheduler.expert_cost import MissRule
from offload.scheduler.expert_policies import MOST_ADMITTED

_LANES = 4
"""As many parts of experts on their way as the disk has threads."""

_BY_TENSOR = ("grouped_mm", "batched_mm")

Part = tuple[int, int]
"""One tensor of the layout, of one expert."""


class ExpertForward:
    """Brings what is needed, in the order in which it is asked for.

    Where a layer needs more experts than it can have slots, those that are worth most get them; the others pass through
    lanes, tensor by tensor in the order of the layout, so that each byte is brought once.

    Args:
        needed: each expert once, those first that were asked for first.
        rows: how many tokens chose each of them.
        wait: waits for slots, and charges the time.
        rule: which of them the CPU computes instead.
    """

    def __init__(
        self,
        layer: int,
        unit: ExpertsUnit,
        cache: ExpertCache,
        store: ExpertSlots,
        needed: Sequence[int],
        rows: Mapping[int, int],
        wait: Callable[[Sequence[int]], None],
        rule: MissRule,
    ) -> None:
        self.asynchronous = store.asynchronous
        """The device waits for copies by itself."""
        self._layer, self._unit, self._cache, self._store, self._wait = layer, unit, cache, store, wait
        self._tensors = {tensor.name: index for index, tensor in enumerate(unit.layout.tensors)}
        self._slots: dict[int, int] = {}
        self._lanes: list[int] = []
        """Free ones."""
        self._borrowed: list[int] = []
        self._queue: deque[Part] = deque()
        self._coming: dict[Part, int] = {}
        self._handed_out: list[int] = []
        """Lanes whose weight is being computed with."""
        self.hits: frozenset[int] = frozenset()
        """Experts that were there, or on their way."""
        self._admitted: frozenset[int] = frozenset()
        """Begun to be brought before the others."""
        self.computed_elsewhere: frozenset[int] = frozenset()
        """Experts that the CPU computes, from CPU memory."""
        self._needed, self._rule = list(needed), rule
        self.rows = rows

    def begin(self) -> None:
        """Give what is needed its slots, and start to bring it. Whatever comes of it, `end` is to follow."""
        self._begin(self._left_to_load(self._needed, self.rows, self._rule) if self._rule.most_tokens else self._needed)

    def in_order_of_arrival(self, name: str, experts: Sequence[int]) -> Sequence[int]:
        """The same experts, those first that are there."""
        place = {part: number for number, part in enumerate((*self._coming, *self._queue))}
        tensor = self._tensors[name]

        def key(expert: int) -> tuple[int, int]:
            slot = self._slots.get(expert)
            if slot is not None:
                return int(self._store.is_coming(slot)), 0
            return 2, place.get((tensor, expert), len(place))

        return sorted(experts, key=key)

    def elsewhere(self, expert: int) -> bool:
        """True if another device computes this one."""
        return expert in self.computed_elsewhere

    def weight(self, name: str, expert: int) -> torch.Tensor:
        """One expert's part of a parameter, on the device; valid until the next call."""
        self._take_back()
        if expert in self.computed_elsewhere:
            return self._store.host_pool(self._layer)[name][expert]
        pool = self._store.pools[self._layer][name]
        if expert in self._slots:
            self._wait([self._slots[expert]])
            return pool[self._slots[expert]]
        part = self._tensors[name], expert
        if part not in self._coming:
            self._load_now(part)
        lane = self._coming.pop(part)
        self._feed()
        self._wait([lane])
        self._handed_out.append(lane)
        return pool[lane]

    def slots(self, name: str, experts: Sequence[int]) -> tuple[torch.Tensor, dict[int, int]]:
        """The parameter with slots in place of experts, and the slots of those of them that have one."""
        self._take_back()
        found = {expert: self._slots[expert] for expert in experts if expert in self._slots}
        self._wait(list(found.values()))
        return self._store.pools[self._layer][name], found

    def end(self) -> None:
        """All has been computed, or nothing more will be: the slots may be others' from now on."""
        self._queue.clear()
        self._take_back()
        for lane in self._coming.values():
            self._store.cancel(lane)
        self._cache.give_back(self._borrowed)
        self._store.used(list(self._slots.values()))
        self._cache.release(self._slots.values())

    def _left_to_load(self, needed: Sequence[int], rows: Mapping[int, int], rule: MissRule) -> list[int]:
        """Without those that the CPU computes: the policy admits few, and the link gets its share."""
        ranks = self._cache.policy.ranks[self._layer]
        here = self._cache.slots[self._layer]
        may = [item for item in needed if here[item] < 0 and rows[item] <= rule.most_tokens]
        may = [item for item in may if self._store.in_host_memory(self._layer, item)]
        may.sort(key=lambda expert: -ranks[expert])
        brought = set(may[: rule.loads(len(may))])
        rest = [item for item in may if item not in brought]
        room = self._cache.room(self._layer) - (len(needed) - len(rest))
        if rest and room > 0:
            # What is needed anyway must not be what makes room.
            kept = [item for item in needed if here[item] >= 0]
            held = self._cache.request(self._layer, kept).hits
            answer = self._cache.request(self._layer, rest, optional=rest, most_loads=MOST_ADMITTED)
            for placed in answer.loads:
                self._store.begin(self._layer, placed.expert, placed.slot)
            self._admitted = frozenset(placed.expert for placed in answer.loads)
            brought |= self._admitted
            self._cache.release(placed.slot for placed in (*held, *answer.loads))
        self.computed_elsewhere = frozenset(may) - brought
        return [item for item in needed if item not in self.computed_elsewhere]

    def _begin(self, needed: Sequence[int]) -> None:
        room = self._cache.room(self._layer)
        lanes = 0 if len(needed) <= room else min(_LANES, max(1, room // 2))
        ranks, here = self._cache.policy.ranks[self._layer], self._cache.slots[self._layer]
        # What is there already costs nothing; of the others, those that are worth most.
        kept = set(sorted(needed, key=lambda expert: (here[expert] < 0, -ranks[expert]))[: room - lanes])
        answer = self._cache.request(self._layer, [expert for expert in needed if expert in kept])
        self._slots = {placed.expert: placed.slot for placed in (*answer.hits, *answer.loads)}
        for placed in answer.loads:
            self._store.begin(self._layer, placed.expert, placed.slot)
        passing = [expert for expert in needed if expert not in self._slots]
        self.hits = frozenset(placed.expert for placed in answer.hits) - self._admitted
        if passing:
            self._borrowed = self._cache.borrow(self._layer, max(1, lanes))
            self._lanes = list(self._borrowed)
            self._queue = deque(self._order(passing))
            self._feed()

    def _order(self, experts: Sequence[int]) -> list[Part]:
        """In which the model's code will ask: kernels for tensor after tensor, its own loop for expert after expert."""
        tensors = self._tensors.values()
        if getattr(self._unit.module.config, "_experts_implementation", None) in _BY_TENSOR:
            return [(tensor, expert) for tensor in tensors for expert in experts]
        return [(tensor, expert) for expert in sorted(experts) for tensor in tensors]

    def _feed(self) -> None:
        """Bring what will be asked for next, as far as there are lanes."""
        while self._lanes and self._queue:
            self._start(self._queue.popleft())

    def _load_now(self, part: Part) -> None:
        """Load a part that is asked for out of turn: what came ahead of it makes room."""
        if part in self._queue:
            self._queue.remove(part)
        if not self._lanes:
            last, lane = self._coming.popitem()
            self._store.cancel(lane)
            self._lanes.append(lane)
            self._queue.appendleft(last)
        self._start(part)

    def _start(self, part: Part) -> None:
        tensor, expert = part
        lane = self._lanes.pop()
        self._store.begin(self._layer, expert, lane, (tensor,))
        self._coming[part] = lane

    def _take_back(self) -> None:
        """What was handed out has been computed with."""
        if self._handed_out:
            self._store.used(self._handed_out)
            self._lanes += self._handed_out
            self._handed_out = []
            self._feed()
