"""Which block is loaded into which slots, and when: events in, instructions out.

The executor and a simulator feed this the same events (a module opens, a module closes) and carry out the same
instructions. Nothing here waits or copies.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from offload.scheduler.phases import BACKWARD
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

    The order of the blocks is learned: in each phase (prefill, decode), which block followed which, and at which block one
    phase turned into another (a forward pass into its backward pass). Until something was seen, the order of the model is
    expected. Where the order changes, the block is loaded at once, and what was loaded ahead in vain makes room.

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
        self._turns: dict[tuple[BlockKey, Phase], Phase] = {}
        self._leases: dict[BlockKey, Lease] = {}
        self._holders: list[Lease | None] = [None] * slot_count
        self._free_count = slot_count
        self._in_use: dict[BlockKey, int] = {}
        self._last: BlockKey | None = None
        self._last_phase: Phase = ""
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
            if key not in self._in_use:
                self._learn(key, phase)
        instructions = self._make_present(keys, phase)
        for key in keys:
            self._in_use[key] = self._in_use.get(key, 0) + 1
        return instructions

    def close(self, keys: Iterable[BlockKey], phase: Phase) -> list[Lease]:
        """The blocks `keys` are no longer needed; the leases whose use ended by this.

        They end too, but for those of blocks that a backward pass comes to next: these stay where they are (`holds`). Their
        weights are those of the forward pass, and loading them again would bring the same bytes.
        """
        unused = []
        for key in keys:
            self._in_use[key] -= 1
            if not self._in_use[key]:
                del self._in_use[key]
                unused.append(self._leases[key])
        stay = self._next_in_backward(phase) if self._turns and unused else set()
        for lease in unused:
            if lease.key not in stay:
                self._release(lease.key)
        return unused

    def holds(self, lease: Lease) -> bool:
        """True if the lease has not ended."""
        return self._leases.get(lease.key) is lease

    def look_ahead(self, phase: Phase) -> list[Instruction]:
        """Loads for what comes next, as far as there is room. Never displaces anything."""
        instructions: list[Instruction] = []
        if not self._free_count:
            return instructions
        for key, _ in self._upcoming(phase):
            if key not in self._leases:
                first = self._free_run(self._slots_of[key])
                if first is None:
                    break
                instructions.append(Load(self._grant(key, first)))
        return instructions

    def forget(self, keys: Container[BlockKey] | None = None) -> list[Instruction]:
        """Evict what is not in use. Args: keys: of these blocks; None for all."""
        unused = [key for key in self._leases if key not in self._in_use and (keys is None or key in keys)]
        return [Evict(self._release(key)) for key in unused]

    def _make_present(self, keys: Sequence[BlockKey], phase: Phase) -> list[Instruction]:
        missing = [key for key in keys if key not in self._leases]
        evicted: list[Instruction] = []
        granted: list[Load] = []
        if not missing:
            return []
        victims = [key for key, _ in reversed(list(self._upcoming(phase))) if key not in keys]
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

    def _learn(self, key: BlockKey, phase: Phase) -> None:
        last, before = self._last, (self._last or "", self._last_phase)
        if last == key and phase != self._last_phase:
            self._turns[before] = phase
        elif last is not None and last != key:
            self._learned[last, phase] = key
            self._turns.pop(before, None)
        self._last, self._last_phase = key, phase

    def _upcoming(self, phase: Phase) -> Iterator[tuple[BlockKey, Phase]]:
        """What is expected to follow and in which phase, nearest first, each block once."""
        if self._last is None:
            yield from ((key, phase) for key in self._slots_of)
            return
        given, passed = {self._last}, set()
        key = self._last
        while (key, phase) not in passed:
            passed.add((key, phase))
            if (key, phase) in self._turns:
                phase = self._turns[key, phase]
                # The other way round, the block of now is needed once more.
                given.discard(self._last)
                if key not in given:
                    given.add(key)
                    yield key, phase
            key = self._learned.get((key, phase)) or self._expected[key]
            if key not in given:
                given.add(key)
                yield key, phase

    def _next_in_backward(self, phase: Phase) -> set[BlockKey]:
        """As many of the next blocks as there are slots for, if backward needs them."""
        room, found = self._slot_count, set()
        for key, when in self._upcoming(phase):
            room -= self._slots_of[key]
            if room < 0 or phase == BACKWARD:
                break
            if when == BACKWARD:
                found.add(key)
        return found

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
