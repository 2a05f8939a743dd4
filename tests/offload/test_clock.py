"""Whose time it was, on a clock that is moved by hand."""

import pytest

from offload.runtime import clock as clocks
from offload.runtime.clock import PassClock
from offload.runtime.recorder import Recorder
from offload.scheduler.phases import DECODE, PREFILL
from offload.scheduler.trace import COMPUTE, OWN


@pytest.fixture
def hands(monkeypatch):
    """Moves the time."""

    class Hands:
        now = 100.0

        def perf_counter(self):
            return self.now

        def pass_by(self, seconds):
            self.now += seconds

    hands = Hands()
    monkeypatch.setattr(clocks, "time", hands)
    return hands


def test_what_is_inside_is_not_also_around(hands):
    clock = PassClock(Recorder())
    clock.begin_pass(PREFILL, 5, 1, 0)
    hands.pass_by(1)
    clock.enter(COMPUTE, "layer")
    hands.pass_by(2)
    clock.enter(OWN, "layer.mlp")
    hands.pass_by(3)
    clock.pause()
    hands.pass_by(4)
    clock.resume()
    clock.charge_wait("disk", hands.now - 4, hands.now)
    hands.pass_by(5)
    clock.leave()
    clock.enter(COMPUTE, "layer.mlp")
    hands.pass_by(6)
    clock.leave()
    hands.pass_by(7)
    clock.leave()
    hands.pass_by(8)
    clock.end_pass()
    times = clock.phases[PREFILL]
    assert times.seconds == 36
    assert times.compute_seconds == 2 + 6 + 7
    assert times.overhead_seconds == 3 + 5
    assert dict(times.wait_seconds) == {"disk": 4}
    assert times.other_seconds == 1 + 8


def test_the_spans_say_the_same(hands):
    recorder = Recorder()
    clock = PassClock(recorder)
    clock.begin_pass(DECODE, 1, 1, 5)
    for _ in range(3):
        clock.enter(OWN, "a")
        hands.pass_by(0.5)
        clock.leave()
        clock.enter(COMPUTE, "a")
        hands.pass_by(2)
        clock.leave()
        hands.pass_by(0.25)
    clock.end_pass()
    causes = recorder.trace.attribution(DECODE)
    assert causes == pytest.approx({OWN: 1.5, COMPUTE: 6, "between blocks": 0.75})


def test_the_chunks_of_a_first_prompt_are_one_prompt(hands):
    clock = PassClock(Recorder())
    for tokens, continues in ((4, False), (4, True), (2, True), (4, False), (4, True)):
        clock.begin_pass(PREFILL, tokens, 3, 0, continues)
        hands.pass_by(1)
        clock.end_pass()
    times = clock.phases[PREFILL]
    assert times.passes == 5
    assert times.tokens == 3 * 18
    assert times.pass_tokens == 10
    assert times.first_seconds == 3


def test_what_an_interrupt_left_inside_is_forgotten(hands):
    clock = PassClock(Recorder())
    clock.begin_pass(DECODE, 1, 1, 5)
    clock.enter(COMPUTE, "a")
    clock.end_pass()
    clock.begin_pass(DECODE, 1, 1, 6)
    hands.pass_by(1)
    clock.end_pass()
    assert clock.phases[DECODE].compute_seconds == 0
    assert clock.phases[DECODE].other_seconds == 1
