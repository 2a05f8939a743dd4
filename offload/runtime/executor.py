"""The one loop: wait for the slot, compute, release, prefetch."""

import time
from collections.abc import Callable, Container, Iterable, Sequence

import torch

from offload.runtime.block_sources import SlotRegion
from offload.runtime.clock import PassClock
from offload.runtime.loading_blocks import LoadingBlocks
from offload.runtime.shared_lock import SharedLock
from offload.runtime.weights import StreamedBlock
from offload.scheduler.phases import STANDALONE
from offload.scheduler.slot_schedule import Evict, Instruction, Lease, Load, SlotSchedule
from offload.scheduler.trace import OWN
from offload.storage.arrival import ARRIVED, Arrival, JointArrival, Waits
from offload.storage.blocks import BlockKey
from offload.storage.devices.base import Device, DeviceBuffer, Event
from offload.storage.errors import SessionError


class LayerExecutor:
    """Carries out what the schedule decides, module by module.

    Blocks are opened by the thread that computes, used, and closed by it; the loads run elsewhere. One thread at a
    time: a second one waits in `lock`.

    Args:
        device: what computes.
        clock: charged with what was waited for.
        lock: of whatever computes on the device; None for a lock of its own.
    """

    def __init__(self, device: Device, clock: PassClock, lock: SharedLock | None = None) -> None:
        self.lock = lock or SharedLock()
        self.turns: Callable[[Sequence[BlockKey]], None] | None = None
        """A function that is called with the blocks that are about to be opened; it returns when it is the caller's turn."""
        self.blocks: dict[BlockKey, StreamedBlock] = {}
        self.slot_bytes = 0
        self.slot_count = 0
        self.before_load: Callable[[Sequence[BlockKey]], None] | None = None
        """Called with the blocks that are about to be loaded."""
        self.after_use: Callable[[], None] = lambda: None
        """Called where a block, or one expert of one, was computed with."""
        self.loading: LoadingBlocks | None = None
        """Resident blocks that have not arrived yet."""
        self.extras: Callable[[BlockKey], Sequence[Arrival]] | None = None
        """Starts to bring what must be there with a block."""
        self._device = device
        self._device_type = device.torch_device.type
        self._clock = clock
        self._schedule = SlotSchedule(0, {})
        self._arena: DeviceBuffer | None = None
        self._arena_range = (0, 0)
        self._guarded = (0, 0)
        self._arrivals: dict[int, Arrival] = {}
        self._bound: set[int] = set()
        self._brought: dict[int, tuple[int, object]] = {}
        """In which interval of time a load began, and the values that it brings."""
        self._last_use: dict[int, tuple[int, Event]] = {}
        self._regions: dict[tuple[int, int], SlotRegion] = {}

    @property
    def device(self) -> torch.device:
        return self._device.torch_device

    def arrange(self, slot_bytes: int, slot_count: int, blocks: Sequence[StreamedBlock]) -> None:
        """Take new slots for these blocks, and give the old ones back first. No block may be open.

        Args:
            slot_bytes: size of one slot.
            slot_count: how many; 0 if nothing is streamed.
            blocks: in the expected order.
        """
        self.free()
        self.blocks = {block.key: block for block in blocks}
        for block in blocks:
            block.forget_slots()
        self.slot_bytes, self.slot_count = slot_bytes, slot_count
        self._arena = self._device.allocate(slot_bytes * slot_count) if slot_count else None
        self._arena_range = _address_range(self._arena)
        self._schedule = SlotSchedule(slot_count, {key: self._slots(block) for key, block in self.blocks.items()})

    @property
    def arena_tensor(self) -> torch.Tensor | None:
        """All slots as bytes; None if there are none."""
        return None if self._arena is None else self._arena.tensor

    def lend(self, nbytes: int) -> memoryview | None:
        """Host memory of `nbytes` until the next block is opened: that of the slots, which are empty then.

        None where the slots are on a device of their own, or smaller.
        """
        memory: memoryview | None = getattr(self._arena, "memory", None) if self._device.shares_host_memory else None
        with self.lock:
            if memory is None or len(memory) < nbytes:
                return None
            self.settle()
            return memory[:nbytes]

    def open(self, keys: Sequence[BlockKey]) -> None:
        """The blocks `keys` are needed: returns when compute may be submitted that uses them.

        Raises:
            ReadError: if the disk failed; no block is open then.
        """
        if self.loading is not None:
            self._clock.pause()
            seconds = self.loading.arrive(keys)
            self._clock.resume()
            self._clock.leave_out(seconds)
        held = [key for key in keys if key in self.blocks]
        if not held:
            return
        if self.turns is not None:
            self.turns(held)
        nested = {key for key in held if self._schedule.is_open(key)}
        phase = self._clock.phase
        self._clock.enter(OWN, held[0])
        try:
            self._open(held, nested, phase)
        finally:
            self._clock.leave()

    def _open(self, held: Sequence[BlockKey], nested: set[BlockKey], phase: str) -> None:
        instructions = self._schedule.open(held, phase)
        try:
            self._carry_out(instructions)
            self._carry_out(self._schedule.look_ahead(phase))
            for key in held:
                if key not in nested:
                    self._enter(key)
        except BaseException:
            self._leave(held)
            raise

    def close(self, keys: Iterable[BlockKey]) -> None:
        """The compute that uses `keys` has been submitted; their slots are free once the device is through with it."""
        self.after_use()
        held = [key for key in keys if key in self.blocks]
        if held:
            self._clock.enter(OWN, held[0])
            try:
                self._leave(held)
                self._carry_out(self._schedule.look_ahead(self._clock.phase))
            finally:
                self._clock.leave()

    def replace(self, block: StreamedBlock) -> None:
        """The block's bytes come from elsewhere from now on. Nothing may be under way.

        Raises:
            SessionError: if it takes more room in the slots than before.
        """
        if self._slots(block) > self._slots(self.blocks[block.key]):
            raise SessionError(
                f"{block.key} takes more room in its slots where its trained weights lie; enter with Training(full=True), so "
                "that they are planned for"
            )
        self.blocks[block.key] = block

    def drop(self, keys: Container[BlockKey]) -> None:
        """Drop what was loaded ahead of these blocks: their bytes are about to change where they come from."""
        self._carry_out(self._schedule.forget(keys))

    def settle(self) -> None:
        """Drop everything that was loaded ahead; afterwards nothing is under way."""
        self._carry_out(self._schedule.forget())
        self._device.synchronize()

    def close_all(self) -> None:
        """Close blocks that an exception or an interrupt left open, and settle."""
        for key in self.blocks:
            while self._schedule.is_open(key):
                self._leave([key])
        self.settle()

    def free(self) -> None:
        """Give the slots' memory back."""
        self.settle()
        self._arena, self._arena_range = None, (0, 0)
        self._regions.clear()
        self._last_use.clear()
        self.blocks = {}

    def guard(self, memory: torch.Tensor | None) -> None:
        """Memory that others than this executor use as slots; None for none any more."""
        self._guarded = (0, 0) if memory is None else (memory.data_ptr(), memory.data_ptr() + memory.nbytes)

    def in_slots(self, tensor: torch.Tensor) -> bool:
        """True if the tensor's memory is a slot, so that it will hold other values soon."""
        if tensor.device.type != self._device_type:
            return False
        address = tensor.data_ptr()
        return self._arena_range[0] <= address < self._arena_range[1] or self._guarded[0] <= address < self._guarded[1]

    def generation_at(self, tensor: torch.Tensor) -> int:
        """The generation of the lease whose slots hold `tensor` now; -1 if nothing does."""
        if not self._arena_range[0] <= tensor.data_ptr() < self._arena_range[1]:
            return -1
        slot = (tensor.data_ptr() - self._arena_range[0]) // self.slot_bytes
        return self._schedule.generation_of(slot)

    def _slots(self, block: StreamedBlock) -> int:
        return -(-block.source.slot_bytes // self.slot_bytes)

    def _carry_out(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Load(lease):
                    self._start(lease)
                case Evict(lease):
                    # Its load may still be writing: the slots are not free before that is over.
                    arrival = self._arrivals.pop(lease.generation, None)
                    self._brought.pop(lease.generation, None)
                    if arrival is not None:
                        arrival.cancel()

    def _start(self, lease: Lease) -> Arrival:
        if self.before_load is not None:
            self.before_load((lease.key,))
        self._brought[lease.generation] = self._clock.interval, self.blocks[lease.key].brought_now
        arrival: Arrival = self.blocks[lease.key].source.start(self._region(lease), self._after(lease))
        self._arrivals[lease.generation] = arrival
        extras = () if self.extras is None else self.extras(lease.key)
        if extras:
            arrival = self._arrivals[lease.generation] = JointArrival((arrival, *extras))
        return arrival

    def _enter(self, key: BlockKey) -> None:
        lease = self._schedule.lease(key)
        block = self.blocks[key]
        # A load that could not even begin is tried again.
        arrival = self._arrivals.get(lease.generation) or self._start(lease)
        self._clock.pause()
        waits = arrival.wait()
        self._clock.resume()
        self.charge_waits(waits)
        for home in block.homes:
            home.notice_changes()
        block.bind(lease.first_slot, self._region(lease).tensor, self._is_complete(lease, block))
        self._bound.add(lease.generation)

    def _is_complete(self, lease: Lease, block: StreamedBlock) -> bool:
        """Whether the load has brought changes too. Fused optimizers write without a trace, but only between passes."""
        interval, brought = self._brought.pop(lease.generation, (-1, None))
        in_a_pass = self._clock.phase != STANDALONE
        return in_a_pass and interval == self._clock.interval and brought is not None and brought == block.brought_now

    def charge_waits(self, waits: Waits) -> None:
        """Compute stood still until now, for these links."""
        at = time.perf_counter() - sum(waits.values())
        for link, seconds in waits.items():
            if seconds:
                self._clock.charge_wait(link, at, at + seconds)
                at += seconds

    def _leave(self, keys: Sequence[BlockKey]) -> None:
        for lease in self._schedule.close(keys, self._clock.phase):
            arrival = self._arrivals.pop(lease.generation, None)
            if lease.generation in self._bound:
                self._bound.remove(lease.generation)
                self.blocks[lease.key].unbind()
            elif arrival is not None:
                # The wait was interrupted: the bytes may still be on their way.
                arrival.cancel()
            if self._schedule.holds(lease):
                self._arrivals[lease.generation] = ARRIVED
            use = (lease.generation, self._device.record())
            for slot in lease.slots:
                self._last_use[slot] = use

    def _after(self, lease: Lease) -> Event | None:
        """The compute that used these slots last: events of one stream, so the latest covers the earlier ones."""
        uses = [self._last_use[slot] for slot in lease.slots if slot in self._last_use]
        return max(uses, key=lambda use: use[0])[1] if uses else None

    def _region(self, lease: Lease) -> SlotRegion:
        at = (lease.first_slot, lease.slot_count)
        if at not in self._regions:
            assert self._arena is not None
            start, end = self.slot_bytes * lease.first_slot, self.slot_bytes * (lease.first_slot + lease.slot_count)
            memory = getattr(self._arena, "memory", None) if self._device.shares_host_memory else None
            with torch.inference_mode(False):
                tensor = self._arena.tensor[start:end]
            self._regions[at] = SlotRegion(tensor, None if memory is None else memory[start:end])
        return self._regions[at]


def _address_range(buffer: DeviceBuffer | None) -> tuple[int, int]:
    if buffer is None:
        return 0, 0
    return buffer.tensor.data_ptr(), buffer.tensor.data_ptr() + buffer.nbytes
