"""Which blocks stay on the device, and how the others are streamed, given which are computed on the CPU.

With nothing computed elsewhere, time falls with every byte that stays, so that the rule is: as much as fits. What is
weighed by its cost is decided in `choice.py`.
"""

from dataclasses import replace

from offload.scheduler.host_memory import blocks_in_host_memory, spread, tables_in_host_memory, weights_in_host_memory
from offload.scheduler.kv_pages import PagedKv, cut
from offload.scheduler.model_spec import BlockRole, ExpertsSpec, ModelSpec, PlacedBlock, Workload
from offload.scheduler.plan import DEVICE_ALONE, HostCompute, Plan
from offload.scheduler.plan_sections import BlockPlan, ExpertsPlan, KvPlan, SplitsPlan, WeightsPlan
from offload.storage.blocks import BlockKey, align_up
from offload.storage.errors import BudgetTooSmall, gib

_SLOT_COUNT = 2
"""One in use, one being filled: enough to keep the link busy as long as computing a block takes less than loading it."""

_SPARE_SLOT_SHARE = 20
"""One more, that is ready when a read takes longer than usual, where it takes at most this part of the room."""

_EXPERT_STAGING = 4
"""Experts are small: as many of them on their way as the disk has threads."""

_SMALL_FRACTION = 64
"""A block this many times smaller than the largest is not worth a transfer of its own."""


def make_plan(
    model: ModelSpec,
    budget_bytes: int,
    workload: Workload,
    host_bytes: int | None = None,
    candidates: frozenset[BlockKey] | None = None,
    host_compute: HostCompute = DEVICE_ALONE,
    encoded: frozenset[BlockKey] = frozenset(),
) -> Plan:
    """Place every block: what fits is resident, spread evenly among the layers; the rest is streamed.

    Args:
        model: the blocks.
        budget_bytes: of the device, all included.
        workload: what KV cache and activations are reserved for.
        host_bytes: CPU memory for blocks that a device with memory of its own streams; None if the device has none.
        candidates: the blocks that may be resident; None for all. A running job gives up blocks and takes none on.
        host_compute: what the CPU computes, from CPU memory.
        encoded: where the CPU is the device, blocks that are kept in memory in their stored form, and decoded at their turn.

    Raises:
        BudgetTooSmall: if not even one block at a time fits; `least_bytes` is the budget that would do.
    """
    if host_bytes is not None and workload.paged is not None:
        pages = workload.kv_host_bytes(model, host_bytes)
        try:
            plan = _make_plan(model, budget_bytes, workload, host_bytes - pages, candidates, host_compute)
        except BudgetTooSmall as error:
            raise _beside_pages(error, workload.kv_host_bytes(model, 2 * error.least_bytes)) from error
        return replace(plan, kv=replace(plan.kv, host_bytes=pages))
    if encoded:
        return _with_encoded(model, budget_bytes, workload, candidates, encoded)
    return _make_plan(model, budget_bytes, workload, host_bytes, candidates, host_compute)


def _with_encoded(
    model: ModelSpec,
    budget_bytes: int,
    workload: Workload,
    candidates: frozenset[BlockKey] | None,
    keys: frozenset[BlockKey],
) -> Plan:
    """Some blocks kept in their stored form: the rest has the room that they leave."""
    kept = [block for block in model.blocks if block.key in keys]
    nbytes = sum(block.encoded_bytes for block in kept)
    others = frozenset(block.key for block in model.blocks) if candidates is None else candidates
    plan = _make_plan(model, budget_bytes - nbytes, workload, None, others - keys, DEVICE_ALONE)
    weights = replace(
        plan.weights,
        in_host_memory=tuple(key for key in plan.weights.streamed if key in keys),
        encoded_bytes=nbytes,
        streamed_bytes=plan.weights.streamed_bytes - sum(block.stored_bytes for block in kept),
    )
    return replace(plan, weights=weights)


def _beside_pages(error: BudgetTooSmall, pages_bytes: int) -> BudgetTooSmall:
    if not error.of_host:
        return error
    return BudgetTooSmall(
        f"pages of the KV cache take {gib(pages_bytes)} of CPU memory; beside them, {error}",
        error.least_bytes + pages_bytes,
        of_host=True,
    )


def _make_plan(
    model: ModelSpec,
    budget_bytes: int,
    workload: Workload,
    host_bytes: int | None,
    candidates: frozenset[BlockKey] | None,
    host_compute: HostCompute,
) -> Plan:
    """Beside the KV cache's part of CPU memory."""
    experts = model.experts
    if experts is None:
        return _with_host_compute(model, budget_bytes, workload, host_bytes, candidates, host_compute)
    staging_bytes = _EXPERT_STAGING * experts.slot_bytes
    host = None if host_bytes is None else host_bytes - staging_bytes
    try:
        plan = _with_host_compute(model, budget_bytes - experts.least_bytes, workload, host, candidates, host_compute)
    except BudgetTooSmall as error:
        if error.of_host:
            raise BudgetTooSmall(
                f"on their way from disk to the device, single experts take {gib(staging_bytes)} of CPU memory; beside them, "
                f"{error}",
                staging_bytes + error.least_bytes,
                of_host=True,
            ) from error
        raise _with_experts(error, budget_bytes, experts) from error
    return _with_expert_slots(plan, model, experts, budget_bytes, host)


def _with_expert_slots(plan: Plan, model: ModelSpec, experts: ExpertsSpec, budget_bytes: int, host_bytes: int | None) -> Plan:
    """Every token computes with all that is no expert, and with few of the experts: these take the room that is left."""
    slots = min((budget_bytes - plan.device_bytes) // experts.slot_bytes, experts.total)
    plan = replace(plan, experts=ExpertsPlan(slots, experts.slot_bytes))
    if host_bytes is None:
        return plan
    loaded = max((block.slot_bytes for block in model.blocks), default=0)
    left = host_bytes - weights_in_host_memory(plan, model) - loaded
    in_host = max(0, min(left // experts.slot_bytes, experts.total))
    staging = 0 if in_host == experts.total else _EXPERT_STAGING
    return replace(plan, experts=replace(plan.experts, in_host_memory=in_host, staging_count=staging))


def _with_experts(error: BudgetTooSmall, budget_bytes: int, experts: ExpertsSpec) -> BudgetTooSmall:
    least = error.least_bytes + experts.least_bytes
    return BudgetTooSmall(
        f"{gib(experts.least_bytes)} of the budget of {gib(budget_bytes)} are for the {experts.least_slots} experts that a "
        f"token needs at once; without them, {error}",
        least,
    )


def _with_host_compute(
    model: ModelSpec,
    budget_bytes: int,
    workload: Workload,
    host_bytes: int | None,
    candidates: frozenset[BlockKey] | None,
    host_compute: HostCompute,
) -> Plan:
    """All but single experts."""
    if not host_compute:
        return _place(model, budget_bytes, workload, host_bytes, candidates, frozenset())
    taken = sum(block.slot_bytes for block in model.blocks if block.key in host_compute.whole | host_compute.shared)
    parts = tuple(
        block.device_part(host_compute.percent) if block.key in host_compute.shared else block for block in model.blocks
    )
    reduced = without(replace(model, blocks=parts), host_compute.whole)
    left = max(0, (host_bytes or 0) - taken)
    plan = _place(reduced, budget_bytes, workload, left, candidates, host_compute.shared)
    weights = replace(
        plan.weights,
        computed_on_host=tuple(block.key for block in model.blocks if block.key in host_compute.whole),
        cpu_gpu_split=tuple(block.key for block in model.blocks if block.key in host_compute.shared),
        cpu_percent=host_compute.percent if host_compute.shared else 0,
        blocks=tuple(BlockPlan.of(block) for block in model.blocks),
    )
    return replace(plan, weights=weights)


def _place(
    model: ModelSpec,
    budget_bytes: int,
    workload: Workload,
    host_bytes: int | None,
    candidates: frozenset[BlockKey] | None,
    cpu_gpu_split: frozenset[BlockKey],
) -> Plan:
    """Args: divided: blocks that are in CPU memory already and stay there."""
    room = budget_bytes - model.always_resident_bytes - workload.kv_bytes(model) - workload.activation_bytes(model)
    everything = {block.key for block in model.blocks}
    candidates = (frozenset(everything) if candidates is None else candidates) - cpu_gpu_split
    if candidates >= everything and sum(block.resident_bytes for block in model.blocks) <= room:
        return _assemble(model, workload, everything, 0, 0, host_bytes, cpu_gpu_split)
    small = _small_blocks(model) & candidates
    room -= sum(block.resident_bytes for block in model.blocks if block.key in small)
    slot_bytes, least_slots = _least_slots(model, small)
    if slot_bytes * least_slots > room:
        raise _too_small(model, budget_bytes, workload, small, candidates >= everything)
    resident, slot_bytes, slot_count = _best_residents(model, small, candidates, room)
    return _assemble(model, workload, resident | small, slot_bytes, slot_count, host_bytes, cpu_gpu_split)


def without(model: ModelSpec, keys: frozenset[BlockKey]) -> ModelSpec:
    """The model as if it had not these blocks."""
    return replace(
        model,
        blocks=tuple(block for block in model.blocks if block.key not in keys),
        co_resident_blocks=tuple(tuple(key for key in group if key not in keys) for group in model.co_resident_blocks),
    )


def least_budget_bytes(model: ModelSpec, workload: Workload) -> int:
    """The smallest budget that `make_plan` takes."""
    experts = 0 if model.experts is None else model.experts.least_bytes
    return experts + _least_bytes(model, workload, _small_blocks(model), True)


def _least_bytes(model: ModelSpec, workload: Workload, small: set[BlockKey], may_stay: bool) -> int:
    """All but single experts. Args: may_stay: all of the model may, if it takes less than its slots."""
    slot_bytes, least_slots = _least_slots(model, small)
    held = sum(block.resident_bytes for block in model.blocks if block.key in small)
    reserved = model.always_resident_bytes + workload.kv_bytes(model) + workload.activation_bytes(model)
    everything = sum(block.resident_bytes for block in model.blocks)
    streamed = held + slot_bytes * least_slots
    return reserved + (min(streamed, everything) if may_stay else streamed)


def _best_residents(
    model: ModelSpec, small: set[BlockKey], allowed: frozenset[BlockKey], room: int
) -> tuple[set[BlockKey], int, int]:
    """Big single blocks first, since each that is streamed makes the slots larger; then layers; tables last."""
    chosen: set[BlockKey] = set()
    for candidates in _candidate_orders(model, allowed - small):
        for block in candidates:
            trial = chosen | {block.key}
            slot_bytes, least = _least_slots(model, small | trial)
            taken = sum(item.resident_bytes for item in model.blocks if item.key in trial)
            if taken + slot_bytes * max(least, _wanted_slots(slot_bytes, least, room)) <= room:
                chosen = trial
    slot_bytes, least = _least_slots(model, small | chosen)
    taken = sum(item.resident_bytes for item in model.blocks if item.key in chosen)
    fitting = (room - taken) // slot_bytes if slot_bytes else 0
    return chosen, slot_bytes, min(fitting, max(least, _wanted_slots(slot_bytes, least, room)))


def _candidate_orders(model: ModelSpec, allowed: frozenset[BlockKey]) -> list[list[PlacedBlock]]:
    rest = [block for block in model.blocks if block.key in allowed]
    layers = [block for block in rest if block.role is BlockRole.LAYER]
    others = sorted((block for block in rest if block.role is BlockRole.OTHER), key=lambda block: -block.slot_bytes)
    tables = [block for block in rest if block.role is BlockRole.TABLE]
    return [others, spread(layers), tables]


def _wanted_slots(slot_bytes: int, least: int, room: int) -> int:
    """Memory is worth more as residency, which saves a transfer in every pass, than as a slot that only evens out jitter."""
    spare = 1 if slot_bytes * _SPARE_SLOT_SHARE <= room else 0
    return max(least, _SLOT_COUNT + spare)


def _small_blocks(model: ModelSpec) -> set[BlockKey]:
    """Norms and the like, always resident; never so many that they add up to a block."""
    largest = max((block.slot_bytes for block in model.blocks), default=0)
    small: set[BlockKey] = set()
    total = 0
    for block in sorted(model.blocks, key=lambda block: block.resident_bytes):
        total += block.resident_bytes
        if block.resident_bytes * _SMALL_FRACTION > largest or total > largest // 4:
            break
        small.add(block.key)
    return small


def _least_slots(model: ModelSpec, resident: set[BlockKey]) -> tuple[int, int]:
    """The size of a slot, and the least number of them, with which everything outside of `resident` can run."""
    streamed = [block for block in model.blocks if block.key not in resident and block.role is not BlockRole.TABLE]
    sizes = {block.key: block.slot_bytes for block in streamed}
    if not streamed:
        return 0, 0
    layers = [block.slot_bytes for block in streamed if block.role is BlockRole.LAYER]
    slot_bytes = align_up(max(layers or [block.slot_bytes for block in streamed]), 4096)
    least = 1
    for module in model.co_resident_blocks:
        least = max(least, sum(-(-sizes[key] // slot_bytes) for key in module if key in sizes))
    return slot_bytes, least


def _assemble(
    model: ModelSpec,
    workload: Workload,
    resident: set[BlockKey],
    slot_bytes: int,
    slot_count: int,
    host_bytes: int | None,
    cpu_gpu_split: frozenset[BlockKey],
) -> Plan:
    outside = [block for block in model.blocks if block.key not in resident]
    streamed = [block for block in outside if block.role is not BlockRole.TABLE]
    tables = [block for block in outside if block.role is BlockRole.TABLE]
    in_host, staging_count, tables_in_host = set(cpu_gpu_split), 0, set()
    if host_bytes is not None:
        rest = [block for block in streamed if block.key not in cpu_gpu_split]
        chosen, staging_count = blocks_in_host_memory(model, rest, host_bytes)
        in_host |= chosen
        if not staging_count:
            tables_in_host = tables_in_host_memory(model, tables, host_bytes - sum(block.host_bytes for block in rest))
    weights = WeightsPlan(
        resident=tuple(block.key for block in model.blocks if block.key in resident),
        streamed=tuple(block.key for block in streamed),
        in_host_memory=tuple(block.key for block in streamed if block.key in in_host),
        row_fetched=tuple(block.key for block in tables),
        tables_in_host_memory=tuple(block.key for block in tables if block.key in tables_in_host),
        slot_bytes=slot_bytes,
        slot_count=slot_count,
        staging_count=staging_count,
        always_resident_bytes=model.always_resident_bytes,
        resident_bytes=sum(block.resident_bytes for block in model.blocks if block.key in resident),
        streamed_bytes=sum(block.stored_bytes for block in streamed),
        blocks=tuple(BlockPlan.of(block) for block in model.blocks),
    )
    kv = KvPlan(reserved_bytes=workload.kv_bytes(model))
    if workload.paged is not None:
        kv = replace(
            kv,
            memory_bytes=workload.paged.memory_bytes,
            resident_bytes=_kv_resident_bytes(model, workload, workload.paged),
            state_offload=workload.paged.state_offload,
            segments=workload.paged.segments,
            stored_percent=workload.paged.stored_percent,
        )
    splits = SplitsPlan(workload.micro_batch, workload.decode_micro_batch(model), workload.prefill_chunk)
    return Plan(weights, kv=kv, splits=splits, activation_bytes=workload.activation_bytes(model))


def _kv_resident_bytes(model: ModelSpec, workload: Workload, paged: PagedKv) -> int:
    if model.kv is None:
        return 0
    try:
        pages = cut(model.kv, workload.batch_size, workload.total_tokens, paged.memory_bytes, paged.segments)
    except BudgetTooSmall:
        # More is asked of it than it was laid out for: nothing can be counted on.
        return 0
    return max(0, pages.resident_pages(model.kv.layers)) * pages.page_bytes


def _too_small(model: ModelSpec, budget_bytes: int, workload: Workload, small: set[BlockKey], may_stay: bool) -> BudgetTooSmall:
    least = _least_bytes(model, workload, small, may_stay)
    slot_bytes, slots = _least_slots(model, small)
    held = model.always_resident_bytes + sum(block.resident_bytes for block in model.blocks if block.key in small)
    kv_bytes, tokens, batch = workload.kv_bytes(model), workload.total_tokens, workload.batch_size
    cache = f"{gib(kv_bytes)} for the KV cache of {batch} x {tokens} tokens, " if kv_bytes else ""
    ways = (["fewer tokens (max_tokens)"] if tokens > 1 else []) + (["a smaller batch (batch_size)"] if batch > 1 else [])
    return BudgetTooSmall(
        f"the memory budget is {gib(budget_bytes)}, and this model needs at least {gib(least, at_least=True)} ({least} bytes): "
        f"{gib(slot_bytes * slots)} for the largest part that must be there at once, {cache}"
        f"{gib(workload.activation_bytes(model))} for temporaries, {gib(held)} for what always stays. Give a larger budget"
        f"{', or reserve for less: ' + ', '.join(ways) if ways else ''}.",
        least,
    )
