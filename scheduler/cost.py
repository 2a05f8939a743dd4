"""How long things take: counted work and bytes, over measured rates. Pure; the only place where the two meet."""

from dataclasses import dataclass

from scheduler.hardware import HardwareProfile, Processor
from scheduler.work import WindowWork, Work

GATHER_THREADS = 4
"""Rows of a table are read by as many threads as blocks are."""


@dataclass(frozen=True, slots=True)
class Span:
    """Time on a processor.

    Attributes:
        submit_seconds: of the thread that submits the operations; the rest runs behind its back.
        compute_seconds: of the processor.
    """

    submit_seconds: float
    compute_seconds: float


class CostModel:
    """Costs on one machine.

    Args:
        hardware: its rates.
        dtype: of the weights, by torch's name.
    """

    def __init__(self, hardware: HardwareProfile, dtype: str) -> None:
        self.hardware = hardware
        self._dtype = dtype
        self._known: dict[tuple[Work, bool], Span] = {}

    def window(self, work: Work, on_host: bool = False) -> Span:
        """The time of `work`: on the device, or on the CPU beside it."""
        known = self._known.get((work, on_host))
        if known is None:
            known = self._known[work, on_host] = self._span(work, self.hardware.host if on_host else self.hardware.computes_on)
        return known

    def gather_seconds(self, window: WindowWork) -> float:
        """Reading the looked-up rows from disk, one request a row."""
        return self.hardware.disk_read.latency_seconds * -(-window.gathered_rows // GATHER_THREADS)

    def _span(self, work: Work, processor: Processor) -> Span:
        matrix = sum(processor.matrix_seconds(flops, rows, self._dtype) for rows, flops in work.products)
        # Attention and element-wise work: the larger of its arithmetic and its memory traffic (roofline).
        best_rate = max(point.flops_per_second for points in processor.matrix_rates.values() for point in points)
        other = max(work.other_flops / best_rate, work.traffic_bytes / processor.memory_bytes_per_second)
        submit = work.operations * processor.operation_seconds
        if processor.asynchronous:
            return Span(submit, max(submit, matrix + other))
        return Span(submit + matrix + other, submit + matrix + other)
