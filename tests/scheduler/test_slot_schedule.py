"""The slots: never two blocks in one, never too few, whatever is asked in which order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.scheduler.slot_schedule import Evict, Load, SlotSchedule


def names(count):
    return [f"block.{index}" for index in range(count)]


def check(schedule, instructions, holders):
    """Follow the instructions; no slot is loaded while another block holds it."""
    for instruction in instructions:
        lease = instruction.lease
        match instruction:
            case Load():
                for slot in lease.slots:
                    assert slot not in holders, "a slot was overwritten"
                    holders[slot] = lease
            case Evict():
                for slot in lease.slots:
                    assert holders.pop(slot) == lease


@st.composite
def workloads(draw):
    count = draw(st.integers(1, 9))
    sizes = {name: draw(st.integers(1, 3)) for name in names(count)}
    slots = draw(st.integers(max(sizes.values()), 8))
    # An order that repeats and is sometimes broken, in two phases.
    order = draw(st.lists(st.sampled_from(names(count)), min_size=1, max_size=12))
    steps = draw(st.lists(st.sampled_from(["pass", "stray"]), max_size=6))
    return sizes, slots, order, steps


@given(workloads())
def test_slots_have_one_owner_and_windows_have_their_block(workload):
    sizes, slots, order, steps = workload
    schedule = SlotSchedule(slots, sizes)
    holders = {}
    generations = set()
    for number, step in enumerate(steps):
        for key in order if step == "pass" else order[:1]:
            phase = "prefill" if number == 0 else "decode"
            check(schedule, schedule.open([key], phase), holders)
            lease = schedule.lease(key)
            assert lease.slot_count == sizes[key]
            assert all(holders[slot] == lease for slot in lease.slots)
            assert schedule.is_open(key)
            assert lease.generation not in generations, "a generation came twice"
            generations.add(lease.generation)
            check(schedule, schedule.look_ahead(phase), holders)
            assert all(holders[slot] == lease for slot in lease.slots), "a block in use was displaced"
            for ended in schedule.close([key], phase):
                assert not schedule.holds(ended)
                for slot in ended.slots:
                    assert holders.pop(slot) == ended
            check(schedule, schedule.look_ahead(phase), holders)
    check(schedule, schedule.forget(), holders)
    assert not holders


@given(st.integers(2, 12), st.integers(2, 6))
def test_in_a_steady_order_everything_is_loaded_ahead_once(count, slots):
    schedule = SlotSchedule(slots, dict.fromkeys(names(count), 1))
    loads = 0
    for number in range(4):
        for key in names(count):
            now = schedule.open([key], "decode")
            if (number, key) != (0, names(count)[0]):
                assert not now, "the block should have been there already"
            loads += len(now)
            loads += len(schedule.look_ahead("decode"))
            schedule.close([key], "decode")
            loads += len(schedule.look_ahead("decode"))
    ahead = len(schedule.forget())
    assert loads == 4 * count + ahead


def test_the_order_is_learned_by_phase():
    schedule = SlotSchedule(2, dict.fromkeys(["encoder", "decoder.0", "decoder.1"], 1))

    def step(key, phase):
        loads = [item for item in schedule.open([key], phase) if isinstance(item, Load)]
        schedule.look_ahead(phase)
        schedule.close([key], phase)
        schedule.look_ahead(phase)
        return len(loads)

    for key in ("encoder", "decoder.0", "decoder.1"):
        step(key, "prefill")
    missed = [step(key, "decode") for _ in range(4) for key in ("decoder.0", "decoder.1")]
    assert sum(missed[4:]) == 0, "the decoder's own cycle was not learned"


def test_nested_and_shared_blocks_stay_until_the_last_window_closes():
    schedule = SlotSchedule(2, {"a": 1, "b": 1})
    schedule.open(["a"], "prefill")
    schedule.open(["a", "b"], "prefill")
    assert [lease.key for lease in schedule.close(["a", "b"], "prefill")] == ["b"]
    assert schedule.is_open("a")
    assert [lease.key for lease in schedule.close(["a"], "prefill")] == ["a"]


def test_a_slot_tells_its_generation():
    schedule = SlotSchedule(1, {"a": 1, "b": 1})
    schedule.open(["a"], "prefill")
    first = schedule.generation_of(0)
    schedule.close(["a"], "prefill")
    assert schedule.generation_of(0) == -1
    schedule.open(["b"], "prefill")
    assert schedule.generation_of(0) > first


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_backward_begins_with_what_forward_left(slots):
    """Forward, then backward in the other order: what is in the slots at the turn is not loaded again."""
    count = 6
    schedule, holders = SlotSchedule(slots, dict.fromkeys(names(count), 1)), {}
    steps = [(key, "prefill") for key in names(count)] + [(key, "backward") for key in reversed(names(count))]

    def step():
        loads, waited = 0, 0
        for key, phase in steps:
            now = schedule.open([key], phase)
            check(schedule, now, holders)
            ahead = schedule.look_ahead(phase)
            check(schedule, ahead, holders)
            for lease in schedule.close([key], phase):
                if not schedule.holds(lease):
                    del holders[lease.first_slot]
            more = schedule.look_ahead(phase)
            check(schedule, more, holders)
            loads += sum(isinstance(item, Load) for item in (*now, *ahead, *more))
            waited += any(isinstance(item, Load) for item in now)
        return loads, waited

    step(), step()
    assert [step() for _ in range(3)] == [(2 * count - slots, 0)] * 3
    # Evaluation in between: a forward pass that no backward pass follows.
    steps, turned = steps[:count], steps
    step(), step()
    steps = turned
    step(), step()
    assert step() == (2 * count - slots, 0)


def test_what_is_open_is_not_evicted_for_what_is_opened_inside_of_it():
    """Three slots, two blocks open, one loaded ahead: the latter makes room, though the outer one is needed again last."""
    outer, inner, ahead, further = names(4)
    schedule = SlotSchedule(3, dict.fromkeys((outer, inner, further, ahead), 1))
    schedule.open([outer], "forward")
    schedule.open([inner], "forward")
    (loaded,) = schedule.look_ahead("forward")
    assert loaded.lease.key == further
    instructions = schedule.open([ahead], "forward")
    assert [(type(item), item.lease.key) for item in instructions] == [(Evict, further), (Load, ahead)]
    assert schedule.is_open(outer)
    assert schedule.lease(outer).key == outer
