"""Transfers: counted, timed, waited for by whoever asked; errors surface there."""

import threading

import pytest

from offload.storage.transfer import Link


@pytest.fixture
def link():
    link = Link("disk", 3)
    yield link
    link.close()


def test_finish_runs_after_all_parts(link):
    seen = []
    link.submit(10, [lambda index=index: seen.append(index) for index in range(20)], lambda: seen.append("end")).wait()
    assert sorted(seen[:-1]) == list(range(20))
    assert seen[-1] == "end"
    assert link.bytes_moved == 10
    assert link.busy_seconds > 0


def test_an_error_reaches_the_waiter_and_counts_nothing(link):
    transfer = link.submit(10, [lambda: None, lambda: 1 / 0], lambda: pytest.fail("finish ran"))
    with pytest.raises(ZeroDivisionError):
        transfer.wait()
    assert link.bytes_moved == 0
    link.submit(4, [lambda: None]).wait()
    assert link.bytes_moved == 4


def test_cancel_waits_for_what_runs_and_skips_the_rest(link):
    started, go = threading.Event(), threading.Event()
    ran = []

    def slow():
        started.set()
        go.wait()
        ran.append("slow")

    transfer = link.submit(1, [slow] + [lambda: ran.append("late")] * 50)
    blocker = [link.submit(1, [go.wait]) for _ in range(4)]
    started.wait()
    threading.Timer(0.05, go.set).start()
    transfer.cancel()
    assert transfer.over
    assert "slow" in ran
    for other in blocker:
        other.wait()


def test_what_is_waited_for_overtakes_what_is_ahead_of_need():
    link = Link("disk", 1)
    gate = threading.Event()
    order = []
    first = link.submit(1, [gate.wait])
    ahead = link.submit(1, [lambda: order.append("ahead")])
    urgent = link.submit_first(1, [lambda: order.append("urgent")])
    gate.set()
    for transfer in (first, ahead, urgent):
        transfer.wait()
    link.close()
    assert order == ["urgent", "ahead"]


def test_when_over_runs_once_before_or_after(link):
    seen = []
    transfer = link.submit(1, [lambda: None])
    transfer.wait()
    transfer.when_over(lambda: seen.append(1))
    assert seen == [1]


def test_a_closed_link_takes_nothing(link):
    link.close()
    with pytest.raises(RuntimeError, match="closed"):
        link.submit(1, [lambda: None])


@pytest.mark.parametrize("hasten", [False, True])
def test_what_nobody_needs_yet_comes_after_everything_else_unless_it_is_hastened(hasten):
    link = Link("disk", 1)
    gate, order = threading.Event(), []
    link.submit(1, [gate.wait])
    behind = link.submit_in_background(2, [lambda: order.append("behind"), lambda: order.append("behind, too")])
    other = link.submit_in_background(1, [lambda: order.append("other")])
    needed = link.submit(1, [lambda: order.append("needed")])
    if hasten:
        behind.hasten()
    gate.set()
    for transfer in (behind, other, needed):
        transfer.wait()
    link.wait_idle()
    link.close()
    behind_first = ["behind", "behind, too", "needed", "other"]
    assert order == (behind_first if hasten else ["needed", "behind", "behind, too", "other"])
