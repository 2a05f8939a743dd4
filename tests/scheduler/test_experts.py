"""The cache of experts: one owner a slot, nothing dropped that is in use, no policy better than knowing the future."""

from dataclasses import replace

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.scheduler.cost import CostModel
from offload.scheduler.expert_cache import ExpertCache
from offload.scheduler.expert_cost import ALWAYS_LOAD, asks_for_nearly_all, miss_rule
from offload.scheduler.expert_policies import ADMISSION, BELADY, LFU, LRU, ONLINE, make_policy
from offload.scheduler.expert_replay import replay, slots_in
from offload.scheduler.hardware import HardwareProfile, LinkRate, MatrixRate, Processor
from offload.scheduler.model_spec import BlockRole, ExpertsSpec, ModelSpec, PlacedBlock, Workload
from offload.scheduler.plan import Plan
from offload.scheduler.planner import least_budget_bytes, make_plan
from offload.scheduler.prediction import predict
from offload.scheduler.routing import DECODE, PREFILL, Routing, Visit
from offload.scheduler.work import ModuleWork, PassWork, Work
from offload.storage.errors import BudgetTooSmall, ConfigError, PlanError
from tests.plans import edited
from tests.scheduler.machines import LAPTOP


@st.composite
def routings(draw):
    layers, experts, chosen = draw(st.integers(1, 3)), draw(st.integers(2, 8)), draw(st.integers(1, 3))
    chosen = min(chosen, experts)
    steps = draw(st.integers(1, 25))
    visits = []
    for step in range(steps):
        for layer in range(layers):
            picked = tuple(draw(st.permutations(range(experts)))[:chosen])
            weights = tuple(draw(st.floats(0.01, 1)) for _ in picked)
            visits.append(Visit(0, PREFILL if step < 2 else DECODE, step, layer, picked, weights))
    return Routing("drawn", layers, experts, (100,) * layers, visits)


@settings(max_examples=60, deadline=None)
@given(routings(), st.integers(1, 30), st.sampled_from(["global", "layer"]))
def test_belady_is_never_beaten(routing, slots, scope):
    slots = max(slots, routing.layers)
    bound = replay(routing, BELADY, slots, scope).overall.hits
    for policy in ONLINE:
        assert replay(routing, policy, slots, scope).overall.hits <= bound


@settings(max_examples=60, deadline=None)
@given(routings(), st.integers(0, 5), st.integers(0, 5))
def test_more_slots_never_lower_the_hits_of_lru(routing, fewer, more):
    chosen = max(len(visit.experts) for visit in routing.visits)
    few, many = (routing.layers * (chosen + count) for count in (fewer, fewer + more))
    assert replay(routing, LRU, few, "layer").overall.hits <= replay(routing, LRU, many, "layer").overall.hits


@settings(max_examples=60, deadline=None)
@given(routings(), st.integers(1, 30), st.sampled_from(ONLINE))
def test_what_is_not_there_is_counted_and_brought(routing, slots, policy):
    result = replay(routing, policy, max(slots, routing.layers))
    asked = sum(len(visit.experts) for visit in routing.visits)
    assert result.overall.choices == asked
    assert result.overall.missed_bytes == 100 * (asked - result.overall.hits)
    if policy != ADMISSION:
        assert result.overall.copies == asked - result.overall.hits
    assert result.overall.copied_bytes == 100 * result.overall.copies


@st.composite
def demands(draw):
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    minimum = draw(st.integers(0, 2))
    slots = draw(st.integers(max(1, minimum * layers), 12))
    calls = draw(
        st.lists(
            st.tuples(st.integers(0, layers - 1), st.sets(st.integers(0, experts - 1), min_size=1)), min_size=1, max_size=30
        )
    )
    return layers, experts, minimum, slots, calls, draw(st.sampled_from(ONLINE))


@settings(max_examples=100, deadline=None)
@given(demands())
def test_slots_have_one_owner_and_what_is_in_use_stays(demand):
    layers, experts, minimum, slots, calls, name = demand
    cache = ExpertCache(layers, experts, slots, make_policy(name, layers, experts), minimum)
    for layer, wanted in calls:
        cache.policy.note(layer, numpy.array([sorted(wanted)]), numpy.ones((1, len(wanted))))
        room = cache.room(layer)
        assert room >= max(1, minimum)
        answer = cache.request(layer, sorted(wanted))
        placed = [*answer.hits, *answer.loads]
        assert len({item.slot for item in placed}) == len(placed)
        assert len(placed) == min(room, len(wanted))
        for item in placed:
            assert cache.holder(item.slot) == (layer, item.expert)
        lanes = cache.borrow(layer, slots)
        assert len(lanes) == room - len(placed)
        assert set(lanes).isdisjoint(item.slot for item in placed)
        cache.give_back(lanes)
        cache.release(item.slot for item in placed)
        held = cache.slots[cache.slots >= 0]
        assert len(set(held.tolist())) == len(held)
        # What others are sure of is still to be had.
        for other in range(layers):
            assert cache.room(other) >= minimum


def test_admission_leaves_out_what_is_hardly_used():
    policy = make_policy(ADMISSION, 1, 4)
    cache = ExpertCache(1, 4, 1, policy)

    def ask(expert):
        policy.note(0, numpy.array([[expert]]), numpy.ones((1, 1)))
        answer = cache.request(0, [expert], optional=[expert])
        cache.release(placed.slot for placed in (*answer.hits, *answer.loads))
        return bool(answer.hits), bool(answer.loads)

    assert ask(0) == (False, True)
    assert ask(0) == (True, False)
    assert ask(1) == (False, False)
    assert [ask(1) for _ in range(3)][-1] == (True, False)


def test_a_use_counts_half_after_a_while():
    policy = make_policy(LFU, 1, 3)
    one = numpy.ones((1, 1))
    for _ in range(4):
        policy.note(0, numpy.array([[0]]), one)
    for _ in range(8):
        policy.note(0, numpy.array([[1]]), one)
    assert policy.ranks[0, 1] > policy.ranks[0, 0] > policy.ranks[0, 2]
    for _ in range(200):
        policy.note(0, numpy.array([[2]]), one)
    # Both faded alike: the order among them stays.
    assert policy.ranks[0, 2] > policy.ranks[0, 1] > policy.ranks[0, 0]


def test_a_long_prompt_counts_by_its_end():
    for name in (LRU, LFU):
        policy = make_policy(name, 1, 4)
        choices = numpy.array([[0]] * 5000 + [[1]] * 50)
        policy.note(0, choices, numpy.ones((5050, 1)))
        assert policy.ranks[0, 1] > policy.ranks[0, 0] > policy.ranks[0, 2]


def trace():
    visits = [
        Visit(0, DECODE, step, layer, (step % 3, 3), (0.75, 0.25), (True, False)) for step in range(6) for layer in (0, 1)
    ]
    return Routing("made.gguf", 2, 4, (1000, 2000), visits)


def test_a_trace_is_what_was_saved(tmp_path):
    trace().save(tmp_path / "run.csv")
    assert Routing.load(tmp_path / "run.csv") == trace()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "first row must be"),
        ("turn,phase\n", "first row must be"),
        ("turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n", "without a single choice"),
        ("turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n0,0,0,0,0,x,1,0,0\n", "line 2"),
        ("turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n0,0,0,0,0,-1,1,0,0\n", "negative"),
        ("turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n0,0,0,0\n", "line 2"),
    ],
)
def test_what_is_no_trace_is_refused(content, said, tmp_path):
    (tmp_path / "no.csv").write_text(content)
    with pytest.raises(ConfigError, match=said):
        Routing.load(tmp_path / "no.csv")


def test_slots_of_a_budget():
    assert slots_in(trace(), 9000) == 4
    with pytest.raises(ConfigError, match="smaller than one expert"):
        slots_in(trace(), 1999)
    with pytest.raises(ConfigError, match="too few"):
        replay(trace(), LRU, 1, "layer")


def test_what_the_cpu_computes_follows_from_the_rates():
    # 1 MB takes the link 40 us, and the CPU's memory 20 us.
    machine = HardwareProfile(
        hardware_id="made",
        description="",
        measured_at="",
        host=Processor("cpu", 1 << 34, 50e9, 0.0, False, {"bfloat16": (MatrixRate(1, 50e9), MatrixRate(64, 200e9))}),
        disk_read=LinkRate(2e9),
        disk_write=LinkRate(1e9),
        device=Processor("gpu", 1 << 34, 900e9, 0.0, True, {"bfloat16": (MatrixRate(1, 1e12),)}),
        h2d=LinkRate(25e9),
        d2h=LinkRate(25e9),
    )
    rule = miss_rule(machine, 1_000_000, 2, "bfloat16")
    # With one row the CPU is as fast as its memory; the break-even is where its arithmetic takes as long as the link.
    assert 1 <= rule.most_tokens <= 8
    assert 0.2 < rule.loaded_share < 0.5
    slow = replace(machine, h2d=LinkRate(2.5e9))
    assert miss_rule(slow, 1_000_000, 2, "bfloat16").most_tokens > 4 * rule.most_tokens
    fast = replace(machine, h2d=LinkRate(100e9))
    assert miss_rule(fast, 1_000_000, 2, "bfloat16") == ALWAYS_LOAD
    alone = replace(machine, device=None, h2d=None, d2h=None)
    assert miss_rule(alone, 1_000_000, 2, "bfloat16") == ALWAYS_LOAD


def test_a_long_prompt_asks_for_nearly_all():
    assert not asks_for_nearly_all(rows=1, count=32, chosen=4)
    assert asks_for_nearly_all(rows=512, count=32, chosen=4)


@pytest.mark.parametrize("slots", [8, 12, 20, 24, 28])
def test_a_scan_gives_up_what_it_wants_last(slots):
    """Pass after pass through all experts: no more misses than slots are lacking, and as many in each layer."""
    layers, experts = 8, 4
    cache = ExpertCache(layers, experts, slots, make_policy("lfu", layers, experts))
    misses = numpy.zeros((6, layers), dtype=int)
    for number in range(6):
        for layer in range(layers):
            cache.policy.note(layer, numpy.arange(experts)[None], numpy.ones((1, experts)))
            cache.scan(layer)
            answer = cache.request(layer, range(experts))
            misses[number, layer] = len(answer.loads)
            cache.release(placed.slot for placed in (*answer.hits, *answer.loads))
    lacking = layers * experts - slots
    # A layer needs all of its experts at once.
    assert misses[-2:].sum() / 2 <= lacking + experts
    assert misses[-2:].max() <= -(-lacking // layers) + 1


def made_model(**fields):
    layers = tuple(PlacedBlock(f"layers.{index}", BlockRole.LAYER, 100_000, 100_000, 100_000) for index in range(4))
    experts = ExpertsSpec(tuple(f"layers.{index}.mlp.experts" for index in range(4)), (8,) * 4, 2, (50_000,) * 4, 60_000)
    return ModelSpec(layers, tuple((block.key,) for block in layers), experts=experts, **fields)


def test_what_every_token_needs_stays_and_experts_get_the_rest():
    model, workload = made_model(), Workload(1, 1, 1)
    plan = make_plan(model, 1_000_000, workload)
    assert len(plan.weights.resident) == 4 and not plan.weights.streamed
    assert plan.experts.slots == 10 and plan.device_bytes == 1_000_000
    assert make_plan(model, 10_000_000, workload).experts.slots == 32
    assert Plan.from_json(plan.to_json()) == plan
    small = make_plan(model, least_budget_bytes(model, workload), workload)
    assert small.weights.streamed and small.experts.slots == 2
    with pytest.raises(BudgetTooSmall) as refusal:
        make_plan(model, least_budget_bytes(model, workload) - 1, workload)
    assert refusal.value.least_bytes == least_budget_bytes(model, workload)


def test_cpu_memory_takes_the_experts_that_fit_and_staging_brings_the_others():
    model, workload = made_model(), Workload(1, 1, 1)
    plan = make_plan(model, 1_000_000, workload, host_bytes=1_000_000)
    held = (plan.experts.in_host_memory + plan.experts.staging_count) * plan.experts.slot_bytes
    assert 0 < plan.experts.in_host_memory < 32 and plan.experts.staging_count and held <= 1_000_000
    roomy = make_plan(model, 1_000_000, workload, host_bytes=10_000_000)
    assert roomy.experts.in_host_memory == 32 and not roomy.experts.staging_count


def test_a_plan_with_experts_is_checked():
    model = made_model()
    plan = make_plan(model, 1_000_000, Workload(1, 1, 1))
    plan.check(model)
    with pytest.raises(PlanError, match="at least 1"):
        edited(plan, "experts", slots=0).check(model)
    with pytest.raises(PlanError, match="not brought one by one"):
        plan.check(replace(model, experts=None))


def test_more_hits_are_predicted_to_be_faster():
    alone = replace(LAPTOP, device=None, h2d=None, d2h=None, h2d_pageable=None)
    cost = CostModel(alone, "bfloat16")
    model = made_model()
    plan = make_plan(model, 1_000_000, Workload(1, 1, 1))
    work = tuple(ModuleWork(f"layers.{index}", (f"layers.{index}",), Work(operations=1)) for index in range(4))
    prefill, decode = PassWork("prefill", 1, 64, work, Work()), PassWork("decode", 1, 1, work, Work())
    seconds = [predict(plan, model, cost, [prefill], decode, rate).seconds_per_token for rate in (0.0, 0.5, 1.0)]
    assert seconds[0] > seconds[1] > seconds[2]
    # Four layers, two experts each, from the disk.
    assert seconds[0] - seconds[2] == pytest.approx(4 * cost.hardware.disk_read.seconds(100_000), rel=0.2)
