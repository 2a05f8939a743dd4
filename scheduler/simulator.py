"""The executor's plan and instructions on a virtual clock: what a run will look like, before it runs."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from offload.scheduler.cost import ComputeTime, CostModel
from offload.scheduler.hardware import HardwareProfile
from offload.scheduler.kv_pages import CPU_ATTENTION_SHARE, cpu_reads_pages
from offload.scheduler.model_spec import ModelSpec
from offload.scheduler.plan import Plan
from offload.scheduler.slot_schedule import Evict, Instruction, Lease, Load, SlotSchedule
from offload.scheduler.trace import COMPUTE, HOST_COMPUTE, OWN, PASS, WAIT, Span, Trace
from offload.scheduler.work import ModuleWork, PassWork, Work
from offload.storage.blocks import BlockKey

DISK, H2D, DECODING = "disk", "h2d", "decoding"

_DECODE_PASSES = 10
"""Over a block's plain bytes, in a card's memory: a few operations of torch, in fp32."""


@dataclass(slots=True)
class _Arrival:
    """When a block that was asked for is there: read from disk, and copied to the device."""

    read_at: float
    copied_at: float


class Simulation:
    """One machine, one plan, any number of passes one after another.

    Args:
        plan: what lives where.
        model: its blocks.
        cost: the machine.
        hit_rate: of a new token's experts, those that are in device memory; None for what is to be expected.
    """

    def __init__(self, plan: Plan, model: ModelSpec, cost: CostModel, hit_rate: float | None = None) -> None:
        self.trace = Trace("simulator")
        self.now = 0.0
        """The time of the thread that runs the model."""
        self._plan = plan
        self._cost = cost
        self._blocks = {block.key: block for block in model.blocks}
        self._layers = frozenset(block.key for block in model.layers)
        parts = plan.parts_of(model)
        self._bytes = {key: block.stored_bytes for key, block in parts.items()}
        self._decode_seconds = {key: block.decode_seconds for key, block in parts.items()}
        self._streamed = frozenset(plan.weights.streamed)
        self._in_host = frozenset(plan.weights.in_host_memory)
        self._on_host = frozenset(plan.weights.computed_on_host)
        self._cpu_gpu_split = frozenset(plan.weights.cpu_gpu_split)
        self._cpu_percent = plan.weights.cpu_percent
        self._row_fetched = frozenset(plan.weights.row_fetched)
        self._tables_in_host = frozenset(plan.weights.tables_in_host_memory)
        self._times: dict[int, tuple[Work, ComputeTime]] = {}
        self._device_free = 0.0
        self._link_free = {DISK: 0.0, H2D: 0.0}
        self._staging = deque([0.0] * plan.weights.staging_count)
        self._slot_free: dict[int, float] = {}
        self._arrivals: dict[int, _Arrival] = {}
        slots = {key: -(-parts[key].slot_bytes // plan.weights.slot_bytes) for key in plan.weights.streamed}
        self._schedule = SlotSchedule(plan.weights.slot_count, {key: slots[key] for key in plan.weights.streamed})
        hardware = cost.hardware
        self._rates = {DISK: hardware.disk_read}
        if hardware.h2d is not None:
            self._rates[H2D] = hardware.h2d
        device = hardware.device
        self._misses = ExpertMisses(model, plan, hit_rate)
        self._pages = KvReads(model, plan, hardware)
        self._pages_at: dict[BlockKey, tuple[str, float]] = {}
        self._own_memory = device is not None
        a_byte = _DECODE_PASSES / device.memory_bytes_per_second if device is not None else 0.0
        self._convert_seconds = {key: a_byte * block.resident_bytes for key, block in parts.items() if block.encoded_bytes}
        self._asynchronous = device is not None and device.asynchronous

    def run(self, work: PassWork) -> float:
        """One call of the model; returns its seconds."""
        begun = self.now
        work = work.in_micro_batches(self._plan.parts(work.batch_size, work.tokens), self._layers)
        self._compute_between(work)
        self._misses.begin_pass(work)
        self._pages.begin_pass(work)
        for module in work.modules:
            self._module(module, work.phase)
        if self._asynchronous:
            self.now = max(self.now, self._device_free)
        self.trace.spans.append(Span(PASS, work.phase, begun, self.now))
        return self.now - begun

    def _compute_between(self, work: PassWork) -> None:
        """The model's code outside of the modules: masks, positions. Most of it comes before the first one."""
        span = self._cost.module(work.between)
        begin = max(self._device_free, self.now)
        self.now += span.submit_seconds
        if self._asynchronous:
            self._device_free = begin + span.compute_seconds

    def _module(self, module: ModuleWork, phase: str) -> None:
        if module.key in self._row_fetched:
            self._gather(module)
            return
        if self._on_host and not self._on_host.isdisjoint(module.uses):
            self._compute_on_host(module)
            return
        keys = [key for key in module.uses if key in self._streamed]
        if not keys:
            self._compute_module(module, ())
            return
        schedule = self._schedule
        self._carry_out(schedule.open(keys, phase))
        self._carry_out(schedule.look_ahead(phase))
        self._own_work(module.key)
        arrivals = [self._enter(schedule.lease(key)) for key in keys]
        ended = self._compute_module(module, arrivals)
        for lease in schedule.close(keys, phase):
            if schedule.holds(lease):
                self._arrivals[lease.generation] = _Arrival(0.0, ended)
            for slot in lease.slots:
                self._slot_free[slot] = ended
        self._carry_out(schedule.look_ahead(phase))

    def _own_work(self, key: BlockKey) -> None:
        """The runtime's, on the thread that runs the model."""
        seconds = self._cost.hardware.module_seconds
        if seconds:
            begin, self.now = self.now, self.now + seconds
            self.trace.spans.append(Span(OWN, key, begin, self.now))

    def _carry_out(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Load):
                self._arrivals[instruction.lease.generation] = self._load(instruction.lease)
            elif isinstance(instruction, Evict):
                arrival = self._arrivals.pop(instruction.lease.generation)
                self.now = max(self.now, arrival.copied_at)

    def _load(self, lease: Lease) -> _Arrival:
        if not self._own_memory:
            read_at = 0.0 if lease.key in self._in_host else self._move(DISK, lease.key, self.now)
            return _Arrival(read_at, read_at)
        slots_free = max([self._slot_free.get(slot, 0.0) for slot in lease.slots])
        if lease.key in self._in_host:
            return _Arrival(0.0, self._move(H2D, lease.key, max(self.now, slots_free)))
        buffer_free = self._staging.popleft()
        read_at = self._move(DISK, lease.key, max(self.now, buffer_free))
        copied_at = self._move(H2D, lease.key, max(read_at, slots_free))
        self._staging.append(copied_at)
        return _Arrival(read_at, copied_at)

    def _move(self, link: str, key: BlockKey, earliest: float) -> float:
        """Queue a transfer on a link, which serves one after another."""
        rate = self._rates[link]
        free = self._link_free[link]
        # A queue hides the latency of all but its first request.
        hidden = 0.0 if earliest >= free else rate.latency_seconds
        begin, nbytes = max(earliest, free), self._bytes[key]
        # A card decodes in line with its copies.
        converting = self._convert_seconds.get(key, 0.0) if link == H2D else 0.0
        end = begin + rate.seconds(nbytes) + converting - hidden
        self._link_free[link] = end
        self.trace.spans.append(Span(link, key, begin, end, nbytes))
        return end

    def _enter(self, lease: Lease) -> _Arrival:
        """Wait as the executor's thread does: for the disk always, for the copy where the device does not itself."""
        arrival = self._arrivals.pop(lease.generation)
        if self._asynchronous:
            self.now = max(self.now, arrival.read_at)
        else:
            self._wait(DISK, arrival.read_at)
            self._wait(H2D, arrival.copied_at)
            if not self._own_memory:
                self._wait(DECODING, self.now + self._decode_seconds[lease.key])
        return arrival

    def _wait(self, link: str, until: float) -> None:
        if until > self.now:
            self.trace.spans.append(Span(WAIT, link, self.now, until))
            self.now = until

    def _compute_module(self, module: ModuleWork, arrivals: Sequence[_Arrival]) -> float:
        """Returns when the compute ends."""
        self._onload_pages(module.key)
        cpu_gpu_split = module.key in self._cpu_gpu_split
        span = self._hybrid_time(module) if cpu_gpu_split else self._time(module.work)
        if not self._asynchronous:
            begin, self.now = self.now, self.now + span.compute_seconds
            self.trace.spans.append(Span(COMPUTE, module.key, begin, self.now))
            self._load_experts(module.key, span.compute_seconds)
            return self.now
        idle = self._device_free
        if arrivals:
            idle = self._idle(DISK, idle, max(arrival.read_at for arrival in arrivals))
            idle = self._idle(H2D, idle, max(arrival.copied_at for arrival in arrivals))
        begin = max(idle, self.now)
        self._device_free = begin + span.compute_seconds
        # What the CPU has a part in ends for both at once.
        self.now = self._device_free if cpu_gpu_split else self.now + span.submit_seconds
        self.trace.spans.append(Span(COMPUTE, module.key, begin, self._device_free))
        if self._misses.bytes_of(module.key):
            # The router's choice is waited for, and then what it chose.
            self.now = self._device_free
            self._load_experts(module.key, span.compute_seconds)
            self._device_free = self.now
        return self._device_free

    def _onload_pages(self, key: BlockKey) -> None:
        """Pages of a layer's keys and values were brought since the layer before began; those of the next one begin now."""
        if not self._pages.brings(key):
            return
        link, arrived = self._pages_at.pop(key) if key in self._pages_at else self._move_pages(key)
        if self._asynchronous:
            self._device_free = self._idle(link, self._device_free, arrived)
        else:
            self._wait(link, arrived)
        following = self._pages.following(key)
        self._pages_at[following] = self._move_pages(following)

    def _move_pages(self, key: BlockKey) -> tuple[str, float]:
        """The link that is the last to end, and when."""
        arrived = {DISK: self.now}
        for link, nbytes in self._pages.by_link(self._own_memory).items():
            begin = max(self.now, self._link_free[link])
            arrived[link] = self._link_free[link] = begin + self._rates[link].seconds(nbytes)
            self.trace.spans.append(Span(link, key, begin, arrived[link], round(nbytes)))
        last = max(arrived, key=lambda link: arrived[link])
        return last, arrived[last] + self._pages.beside_seconds

    def _load_experts(self, key: BlockKey, compute_seconds: float) -> None:
        """Experts that were missing came while the layer computed with the others: from about its middle on."""
        nbytes = self._misses.bytes_of(key)
        if not nbytes:
            return
        seconds = {}
        host = nbytes * self._misses.host_share if self._own_memory else 0.0
        if nbytes > host:
            seconds[DISK] = self._rates[DISK].seconds(nbytes - host)
        if self._own_memory:
            seconds[H2D] = self._rates[H2D].seconds(nbytes)
        link = max(seconds, key=lambda name: seconds[name])
        begin = max(self.now - compute_seconds / 2, self._link_free[link])
        end = begin + seconds[link]
        self._link_free[link] = end
        self.trace.spans.append(Span(link, key, begin, end, round(nbytes)))
        self._wait(link, end)

    def _time(self, work: Work) -> ComputeTime:
        """As the cost model says; each work is looked up once, by identity, since comparing them takes longer."""
        known = self._times.get(id(work))
        if known is None:
            known = self._times[id(work)] = (work, self._cost.module(work))
        return known[1]

    def _hybrid_time(self, module: ModuleWork) -> ComputeTime:
        return self._cost.hybrid(module, self._blocks[module.key], self._cpu_percent, self._copying_seconds())

    def _copying_seconds(self) -> float:
        """Seconds until the link is idle, given what is queued."""
        return max(0.0, self._link_free[H2D] - self.now)

    def _idle(self, link: str, since: float, until: float) -> float:
        """The device has nothing to compute, because of a link."""
        if until <= since:
            return since
        self.trace.spans.append(Span(WAIT, link, since, until))
        return until

    def _compute_on_host(self, module: ModuleWork) -> None:
        hardware = self._cost.hardware
        assert hardware.d2h is not None
        assert hardware.h2d is not None
        self.now = max(self.now, self._device_free) + hardware.d2h.seconds(module.result_bytes)
        begin = self.now
        self.now += self._cost.on_host(module.work, self._copying_seconds())
        self.trace.spans.append(Span(HOST_COMPUTE, module.key, begin, self.now))
        self.now += hardware.h2d.seconds(module.result_bytes)
        self._device_free = max(self._device_free, self.now)

    def _gather(self, module: ModuleWork) -> None:
        if module.key not in self._tables_in_host:
            begin = self.now
            self.now += self._cost.gather_seconds(module)
            self.trace.spans.append(Span(WAIT, DISK, begin, self.now))
        self._compute_module(module, ())


class KvReads:
    """Pages of keys and values that a pass reads from lower tiers, the same for every layer."""

    def __init__(self, model: ModelSpec, plan: Plan, hardware: HardwareProfile) -> None:
        self._shape = model.kv if plan.kv.memory_bytes else None
        self._plan = plan
        self._keys = [block.key for block in model.layers]
        self._places = {key: place for place, key in enumerate(self._keys)}
        self._host = hardware.host.memory_bytes_per_second
        self._beside = plan.kv.segments and cpu_reads_pages(hardware)
        self._layer_bytes = 0.0
        self._on_host = 0.0
        self.beside_seconds = 0.0
        """Seconds in which the CPU reads what it has of a layer where it is."""

    def begin_pass(self, work: PassWork) -> None:
        if self._shape is None or not self._keys:
            return
        stored = work.batch_size * work.context_tokens * self._shape.all_token_bytes * self._plan.kv.stored_percent / 100
        below = max(0.0, stored - self._plan.kv.resident_bytes)
        self._on_host = min(1.0, self._plan.kv.host_bytes / below) if below else 0.0
        # Layers that keep no tokens count as others: what is read is all there is, spread among all.
        self._layer_bytes = below / len(self._keys)
        if self._beside:
            self.beside_seconds = self._layer_bytes * self._on_host / (self._host * CPU_ATTENTION_SHARE)

    def brings(self, key: BlockKey) -> bool:
        return self._layer_bytes > 0 and key in self._places

    def following(self, key: BlockKey) -> BlockKey:
        return self._keys[(self._places[key] + 1) % len(self._keys)]

    def by_link(self, own_memory: bool) -> dict[str, float]:
        """Bytes of a layer. Args: own_memory: the device has memory of its own."""
        if not own_memory:
            return {DISK: self._layer_bytes}
        disk = self._layer_bytes * (1 - self._on_host)
        crosses = disk if self._beside else self._layer_bytes
        return {link: nbytes for link, nbytes in ((DISK, disk), (H2D, crosses)) if nbytes}


class ExpertMisses:
    """Experts that are brought in a pass, by layer.

    Args:
        hit_rate: of a new token's experts; None for what is to be expected.
    """

    def __init__(self, model: ModelSpec, plan: Plan, hit_rate: float | None) -> None:
        self._experts = model.experts
        self._bytes: dict[BlockKey, float] = {}
        self._layers: dict[BlockKey, int] = {}
        if model.experts is None:
            return
        keys = [block.key for block in model.blocks]
        for index, experts in enumerate(model.experts.layers):
            above = [key for key in keys if experts == key or experts.startswith(f"{key}.")]
            host_compute = [key for key in keys if key.startswith(f"{experts.rpartition('.')[0]}.")]
            for key in (*above, *host_compute)[:1]:
                self._layers[key] = index
        self.host_share = plan.experts.in_host_memory / model.experts.total
        self._share = plan.experts.slots / model.experts.total
        self._hit_rate = model.experts.hit_rate(plan.experts.slots) if hit_rate is None else hit_rate

    def begin_pass(self, work: PassWork) -> None:
        """What a pass of so many tokens brings."""
        if self._experts is None:
            return
        rows = work.batch_size * work.tokens
        # In a prompt nearly all experts are asked for, whatever is there.
        missing = 1.0 - (self._hit_rate if work.tokens == 1 else self._share)
        self._bytes = {
            key: missing * self._experts.needed(rows, layer) * self._experts.expert_bytes[layer]
            for key, layer in self._layers.items()
        }

    def bytes_of(self, key: BlockKey) -> float:
        return self._bytes.get(key, 0.0)


def simulate(plan: Plan, model: ModelSpec, cost: CostModel, passes: Iterable[PassWork]) -> Trace:
    """The trace of these passes, one after another."""
    simulation = Simulation(plan, model, cost)
    for work in passes:
        simulation.run(work)
    return simulation.trace
