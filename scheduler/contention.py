"""Compute and reads that slow each other down, for as long as both go on."""

from collections.abc import Callable

from offload.scheduler.cost import CostModel
from offload.scheduler.trace import COMPUTE, Span, Trace

_ROUNDS = 3
"""How much overlaps depends on how slow both are, and that on how much overlaps: so often it is looked at again."""


def settle(cost: CostModel, simulate: Callable[[CostModel], Trace]) -> CostModel:
    """The costs at which compute and reads are as slow as their overlap makes them.

    While both go on, each gets on at a share of its rate alone: what took `c` seconds and overlapped for `o` of them takes
    `c + o (1 - share)`, of work that is done alone as well.

    Args:
        simulate: gives the trace of the passes, at given costs.
    """
    hardware = cost.hardware
    if hardware.device is not None or hardware.compute_beside_reads == hardware.reads_beside_compute == 1.0:
        return cost
    slower = cost
    for _ in range(_ROUNDS):
        trace = simulate(slower)
        computing, reading = trace.on(COMPUTE), trace.on("disk")
        overlap = _overlap(computing, reading)
        if not overlap:
            return slower
        slower = cost.slowed(
            _slowdown(_seconds(computing) / slower.compute_slowdown, overlap, hardware.compute_beside_reads),
            _slowdown(_seconds(reading) / slower.disk_slowdown, overlap, hardware.reads_beside_compute),
        )
    return slower


def _slowdown(alone: float, overlap: float, share: float) -> float:
    # All of it overlaps at the most: then it is as slow as its share.
    return min(1.0 / share, 1.0 + overlap * (1.0 - share) / alone)


def _seconds(spans: list[Span]) -> float:
    return sum(span.end_seconds - span.begin_seconds for span in spans)


def _overlap(first: list[Span], second: list[Span]) -> float:
    """Seconds in which a span of each goes on; the spans of one kind follow each other."""
    total, place = 0.0, 0
    for span in first:
        while place < len(second) and second[place].end_seconds <= span.begin_seconds:
            place += 1
        at = place
        while at < len(second) and second[at].begin_seconds < span.end_seconds:
            total += min(span.end_seconds, second[at].end_seconds) - max(span.begin_seconds, second[at].begin_seconds)
            at += 1
    return total
