"""Places for pages: which are taken, so that neighbours can be copied in one."""

import pytest

from offload.storage.host_buffer import HostBuffer
from offload.storage.pages.slots import PageSlots

PAGE = 1 << 20


@pytest.fixture
def slots():
    return PageSlots(HostBuffer, PAGE, 64)


def test_interleaved_layers_lie_in_runs(slots):
    last = dict.fromkeys(range(4))
    places = {layer: [] for layer in last}
    for _ in range(16):
        for layer in last:
            last[layer] = slots.take_behind(last[layer])
            places[layer].append(last[layer])
    assert sorted(place for own in places.values() for place in own) == list(range(64))
    for own in places.values():
        assert sum(slots.follows(after, before) for before, after in zip(own, own[1:], strict=False)) == 14
    assert slots.take_behind(3) is None


def test_what_is_left_is_taken_wherever_it_lies(slots):
    for _ in range(64):
        slots.take()
    for slot in (5, 9, 40):
        slots.give(slot)
    assert [slots.take_behind(8), slots.take_behind(None), slots.take_behind(None)] == [9, 5, 40]


def test_several_are_neighbours_where_there_are_some(slots):
    for _ in range(64):
        slots.take()
    for slot in (1, 20, 21, 22, 40, 50, 51):
        slots.give(slot)
    assert slots.take_together(3) == [20, 21, 22]
    assert slots.take_together(3) == [40, 50, 51]
    assert slots.take_together(3) == [1]


def test_no_neighbours_across_two_pieces_of_memory(slots):
    assert slots.follows(31, 30)
    assert not slots.follows(32, 31)
    assert not slots.follows(30, 31)
