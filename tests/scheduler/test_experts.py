"""The cache of experts: one owner a slot, nothing dropped that is in use, no policy better than knowing the future."""

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.expert_cache import ExpertCache
from scheduler.expert_policies import ADMISSION, BELADY, LFU, LRU, ONLINE, make_policy
from scheduler.expert_replay import replay, slots_in
from scheduler.routing import DECODE, PREFILL, Routing, Visit
from storage.errors import ConfigError


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
