"""Plans fit their budget, and the least budget is the least."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.scheduler.host_memory import spread
from offload.scheduler.model_spec import ActivationSizes, BlockRole, DivisibleWeight, ModelSpec, PlacedBlock, Workload
from offload.scheduler.plan import HostCompute, Plan
from offload.scheduler.planner import least_budget_bytes, make_plan
from offload.storage.errors import BudgetTooSmall

MIB = 1 << 20
WORK = Workload(batch_size=2, total_tokens=100, pass_tokens=50)


def block(key, role, size):
    weights = (DivisibleWeight(size // 2 // 1024, 1024, 2),) * 2 if role is BlockRole.LAYER else ()
    return PlacedBlock(key, role, size, size + 4096, size, weights)


@st.composite
def models(draw):
    size = draw(st.integers(1, 40)) * MIB
    blocks = [block("embed", BlockRole.TABLE, draw(st.integers(1, 60)) * MIB)]
    blocks += [block(f"layer.{index}", BlockRole.LAYER, size) for index in range(draw(st.integers(1, 20)))]
    blocks += [block("norm", BlockRole.OTHER, 4096), block("head", BlockRole.OTHER, draw(st.integers(1, 60)) * MIB)]
    return ModelSpec(
        tuple(blocks), tuple((item.key,) for item in blocks[1:]), 1000, 2000, 300, ActivationSizes(draw(st.integers(0, 50_000)))
    )


@given(models(), st.integers(0, 2000), st.one_of(st.none(), st.integers(0, 2000)))
def test_a_plan_fits_and_places_every_block_once(model, budget_mib, host_mib):
    budget = budget_mib * MIB
    try:
        plan = make_plan(model, budget, WORK, None if host_mib is None else host_mib * MIB)
    except BudgetTooSmall as error:
        too_small_for_device = error.least_bytes > budget
        assert too_small_for_device or (host_mib is not None and error.least_bytes > host_mib * MIB)
        return
    assert plan.device_bytes <= budget
    placed = (*plan.weights.resident, *plan.weights.streamed, *plan.weights.row_fetched)
    assert sorted(placed) == sorted(item.key for item in model.blocks)
    sizes = {item.key: item for item in model.blocks}
    for key in plan.weights.streamed:
        assert sizes[key].slot_bytes <= plan.arena_bytes
    assert set(plan.weights.in_host_memory) <= set(plan.weights.streamed)
    if host_mib is not None:
        assert sum(sizes[key].slot_bytes for key in plan.weights.held_in_host_memory) <= host_mib * MIB
        if set(plan.weights.in_host_memory) < set(plan.weights.streamed):
            assert not plan.weights.tables_in_host_memory, "blocks come first: a row costs one request to the disk"
    assert Plan.from_json(json.dumps(json.loads(plan.to_json()))) == plan


@given(models(), st.integers(1, 99), st.integers(0, 2000), st.integers(0, 2000), st.data())
def test_layers_that_are_divided_or_on_the_cpu_fit_too(model, percent, budget_mib, host_mib, data):
    layers = [item.key for item in model.layers]
    divided = frozenset(data.draw(st.sets(st.sampled_from(layers))))
    whole = frozenset(data.draw(st.sets(st.sampled_from(layers)))) - divided
    taken = sum(item.slot_bytes for item in model.blocks if item.key in whole | divided)
    host_bytes = taken + host_mib * MIB
    try:
        plan = make_plan(model, budget_mib * MIB, WORK, host_bytes, host_compute=HostCompute(whole, divided, percent))
    except BudgetTooSmall:
        return
    plan.check(model)
    assert plan.device_bytes <= budget_mib * MIB
    assert set(plan.weights.cpu_gpu_split) == divided <= set(plan.weights.in_host_memory)
    assert set(plan.weights.computed_on_host) == whole
    sizes = {item.key: item for item in model.blocks}
    held = sum(sizes[key].slot_bytes for key in plan.weights.held_in_host_memory)
    assert held <= host_bytes
    moved = sum(sizes[key].stored_bytes for key in plan.weights.streamed)
    assert plan.weights.streamed_bytes <= moved
    assert plan.completed(model, WORK, own_memory=True).weights.streamed_bytes == plan.weights.streamed_bytes
    assert Plan.from_json(plan.to_json()) == plan


@given(models(), st.integers(1, 8), st.integers(1, 50))
def test_what_is_taken_apart_holds_less(model, micro_batch, chunk):
    workload = Workload(batch_size=8, total_tokens=100, pass_tokens=50)
    parts = replace(workload, prefill_chunk=chunk)
    assert parts.activation_bytes(model) <= workload.activation_bytes(model)
    smaller = replace(parts, micro_batch=micro_batch)
    joined = 2 * workload.kv_bytes(model) // len(model.layers)
    assert smaller.activation_bytes(model) <= parts.activation_bytes(model) + joined


@given(models())
def test_the_least_budget_works_and_a_byte_less_does_not(model):
    least = least_budget_bytes(model, WORK)
    assert make_plan(model, least, WORK).device_bytes <= least
    with pytest.raises(BudgetTooSmall) as refusal:
        make_plan(model, least - 1, WORK)
    assert refusal.value.least_bytes == least
    assert str(least) in str(refusal.value)


@given(models(), st.integers(0, 1500), st.integers(0, 1500))
def test_a_smaller_plan_takes_no_new_residents(model, first_mib, second_mib):
    least = least_budget_bytes(model, WORK)
    large, small = least + max(first_mib, second_mib) * MIB, least + min(first_mib, second_mib) * MIB
    before = make_plan(model, large, WORK)
    try:
        after = make_plan(model, small, WORK, candidates=frozenset(before.weights.resident))
    except BudgetTooSmall:
        return
    assert set(after.weights.resident) <= set(before.weights.resident)
    assert after.device_bytes <= small


@given(st.integers(1, 80), st.integers(1, 80))
def test_residents_lie_evenly(count, taken):
    layers = [block(str(index), BlockRole.LAYER, 1) for index in range(count)]
    order = spread(layers)
    assert sorted(item.key for item in order) == sorted(item.key for item in layers)
    chosen = sorted(int(item.key) for item in order[: min(taken, count)])
    gaps = [second - first for first, second in zip(chosen, chosen[1:], strict=False)]
    assert not gaps or max(gaps) <= 4 * count / len(chosen) + 1


def test_more_budget_makes_more_resident():
    layers = [block(f"layer.{index}", BlockRole.LAYER, 10 * MIB) for index in range(16)]
    model = ModelSpec(tuple(layers), tuple((item.key,) for item in layers))
    counts = [len(make_plan(model, budget * MIB, WORK).weights.resident) for budget in range(30, 200, 10)]
    assert counts == sorted(counts)
    assert counts[-1] == 16


def test_a_huge_head_is_streamed_through_several_slots():
    layers = [block(f"layer.{index}", BlockRole.LAYER, MIB) for index in range(8)]
    head = block("head", BlockRole.OTHER, 5 * MIB)
    model = ModelSpec((*layers, head), tuple((item.key,) for item in (*layers, head)))
    plan = make_plan(model, least_budget_bytes(model, WORK), WORK)
    assert "head" in plan.weights.streamed
    assert plan.weights.slot_count >= 5
