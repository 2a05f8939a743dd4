"""Which block is loaded into which slots, and when: events in, instructions out.

The executor and a simulator feed this the same events (a module opens, a module closes) and carry out the same
instructions. Nothing here waits or copies.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from offload.storage.blocks import BlockKey


@dataclass(frozen=True, slots=True)
class Lease:
    """Neighbouring slots that hold one block.

    Attributes:
        generation: unlike that of every other lease there was or will be.
    """

    key: BlockKey
    first_slot: int
    slot_count: int
    generation: int

    @property
    def slots(self) -> range:
        return range(self.first_slot, self.first_slot + self.slot_count)


@dataclass(frozen=True, slots=True)
class Load:
    """Start bringing a block into its slots."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Evict:
    """Forget a block that was loaded ahead and not used: its load must be over before the slots are used again."""

    lease: Lease


Instruction = Load | Evict
Phase = str


class SlotSchedule:
    """The slots, what they hold, and what will be needed next.

    The order of the blocks is learned: in each phase (prefill, decode), which block followed which. Until something was
    seen, the order of the model is expected. Where the order changes, the block is loaded at once, and what was
    loaded ahead in vain makes room.

    Args:
        slot_count: how many slots there are.
        slots_of: how many neighbouring slots each streamed block takes, in the expected order.
    """

    def __init__(self, slot_count: int, slots_of: Mapping[BlockKey, int]) -> None:
        self._slot_count = slot_count
        self._slots_of = dict(slots_of)
        order = list(slots_of)
        self._expected = dict(zip(order, order[1:] + order[:1], strict=True))
        self._learned: dict[tuple[BlockKey, Phase], BlockKey] = {}
        self._leases: dict[BlockKey, Lease] = {}
        self._holders: list[Lease | None] = [None] * slot_count
        self._free_count = slot_count
        self._in_use: dict[BlockKey, int] = {}
        self._last: BlockKey | None = None
        self._generation = 0
        self._next_slot = 0

    def lease(self, key: BlockKey) -> Lease:
        return self._leases[key]

    def is_open(self, key: BlockKey) -> bool:
        return key in self._in_use

    def generation_of(self, slot: int) -> int:
        """The generation of the lease that holds `slot`; -1 if it is free."""
        holder = self._holders[slot]
        return -1 if holder is None else holder.generation

    def open(self, keys: Sequence[BlockKey], phase: Phase) -> list[Instruction]:
        """The blocks `keys` are needed now, all of them at once.

        Raises:
            AssertionError: if the slots are too few for them, which a plan made by the planner rules out.
        """
        for key in keys:
            if self._last is not None and key != self._last and key not in self._in_use:
                self._learned[self._last, phase] = key
            if key not in self._in_use:
                self._last = key
        instructions = self._make_present(keys, phase)
        for key in keys:
            self._in_use[key] = self._in_use.get(key, 0) + 1
        return instructions

    def close(self, keys: Iterable[BlockKey]) -> list[Lease]:
        """The blocks `keys` are no longer needed; the leases that ended by this."""
        ended = []
        for key in keys:
            self._in_use[key] -= 1
            if not self._in_use[key]:
                del self._in_use[key]
                ended.append(self._release(key))
        return ended

    def look_ahead(self, phase: Phase) -> list[Instruction]:
        """Loads for what comes next, as far as there is room. Never displaces anything."""
        instructions: list[Instruction] = []
        if not self._free_count:
            return instructions
        for key in self._upcoming(phase):
            if key not in self._leases:
                first = self._free_run(self._slots_of[key])
                if first is None:
                    break
                instructions.append(Load(self._grant(key, first)))
        return instructions

    def forget(self) -> list[Instruction]:
        """Evict all that is not in use."""
        return [Evict(self._release(key)) for key in list(self._leases) if key not in self._in_use]

    def _make_present(self, keys: Sequence[BlockKey], phase: Phase) -> list[Instruction]:
        missing = [key for key in keys if key not in self._leases]
        evicted: list[Instruction] = []
        granted: list[Load] = []
        if not missing:
            return []
        victims = [key for key in reversed(list(self._upcoming(phase))) if key not in keys]
        victims += [key for key in self._leases if key not in keys and key not in victims]
        for key in missing:
            while (first := self._free_run(self._slots_of[key])) is None:
                victim = next((name for name in victims if name in self._leases and name not in self._in_use), None)
                if victim is None:
                    for load in granted:
                        self._release(load.lease.key)
                    return evicted + self._start_over(keys)
                evicted.append(Evict(self._release(victim)))
            granted.append(Load(self._grant(key, first)))
        return [*evicted, *granted]

    def _start_over(self, keys: Sequence[BlockKey]) -> list[Instruction]:
        """There is room, but in pieces: evict all that can be, then place the blocks side by side."""
        instructions = self.forget()
        for key in keys:
            if key in self._in_use:
                continue
            first = self._free_run(self._slots_of[key])
            if first is None:
                raise AssertionError(f"{self._slot_count} slots are too few for {list(keys)} at once")
            instructions.append(Load(self._grant(key, first)))
        return instructions

    def _upcoming(self, phase: Phase) -> Iterator[BlockKey]:
        """What is expected to follow, nearest first, each block once."""
        if self._last is None:
            yield from self._slots_of
            return
        seen = {self._last}
        key = self._last
        while True:
            key = self._learned.get((key, phase)) or self._expected[key]
            if key in seen:
                return
            seen.add(key)
            yield key

    def _grant(self, key: BlockKey, first: int) -> Lease:
        self._generation += 1
        lease = Lease(key, first, self._slots_of[key], self._generation)
        self._leases[key] = lease
        for slot in range(first, first + lease.slot_count):
            self._holders[slot] = lease
        self._free_count -= lease.slot_count
        self._next_slot = (first + lease.slot_count) % self._slot_count
        return lease

    def _release(self, key: BlockKey) -> Lease:
        lease = self._leases.pop(key)
        for slot in range(lease.first_slot, lease.first_slot + lease.slot_count):
            self._holders[slot] = None
        self._free_count += lease.slot_count
        return lease

    def _free_run(self, count: int) -> int | None:
        """The first of `count` neighbouring free slots, searched onwards from the slot after the last granted."""
        holders = self._holders
        starts = self._slot_count - count
        order: list[int] = [*range(self._next_slot, self._slot_count), *range(self._next_slot)]
        for start in order:
            if start <= starts and holders[start] is None and (count == 1 or not any(holders[start : start + count])):
                return start
        return None
