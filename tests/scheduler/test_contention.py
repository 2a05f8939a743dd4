"""Compute and reads that slow each other down."""

from dataclasses import replace

import pytest

from offload.scheduler.contention import settle
from offload.scheduler.cost import CostModel
from offload.scheduler.hardware import HardwareProfile
from offload.scheduler.trace import COMPUTE, Span, Trace
from offload.storage.contention import Contention
from tests.scheduler.machines import LAPTOP


def machine(compute, reads) -> HardwareProfile:
    return replace(LAPTOP, device=None, h2d=None, d2h=None, compute_beside_reads=compute, reads_beside_compute=reads)


def side_by_side(compute, reads):
    """A pass that begins to compute and to read at once; seconds alone."""

    def simulate(cost):
        spans = [
            Span(COMPUTE, "layer", 0.0, compute * cost.compute_slowdown),
            Span("disk", "layer", 0.0, reads * cost.disk_slowdown),
        ]
        return Trace("simulator", spans)

    return simulate


@pytest.mark.parametrize("shares", [(0.5, 0.65), (0.9, 0.3), (1.0, 0.5), (0.7, 0.7)], ids=str)
@pytest.mark.parametrize("seconds", [(1.0, 1.0), (0.2, 1.0), (1.0, 0.1), (3.0, 2.0)], ids=str)
def test_it_takes_as_long_as_both_at_once_can(shares, seconds):
    simulate = side_by_side(*seconds)
    trace = simulate(settle(CostModel(machine(*shares), "float32"), simulate))
    assert trace.end_seconds == pytest.approx(Contention(*shares).least_seconds(*seconds), rel=0.05)


def test_nothing_changes_where_they_do_not_meet():
    cost = CostModel(machine(0.5, 0.5), "float32")
    apart = Trace("simulator", [Span("disk", "a", 0.0, 1.0), Span(COMPUTE, "a", 1.0, 2.0)])
    assert settle(cost, lambda each: apart) is cost
    free = CostModel(machine(1.0, 1.0), "float32")
    assert settle(free, side_by_side(1.0, 1.0)) is free


def test_costs_are_slower_by_what_was_said():
    cost = CostModel(machine(0.5, 0.5), "float32")
    slower = cost.slowed(2.0, 4.0)
    assert slower.hardware.disk_read.seconds(1 << 30) == pytest.approx(4 * cost.hardware.disk_read.seconds(1 << 30))
    assert (slower.compute_slowdown, slower.disk_slowdown) == (2.0, 4.0)
