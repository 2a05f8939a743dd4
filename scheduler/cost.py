"""How long things take: counted work and bytes, over measured rates. Pure; the only place where the two meet."""

from dataclasses import dataclass, replace

from offload.scheduler.hardware import HardwareProfile, Processor
from offload.scheduler.model_spec import DivisibleWeight, PlacedBlock
from offload.scheduler.work import ModuleWork, Work
from offload.storage.blocks import DTYPE_BYTES

_LEAST_SHARE = 0.1
"""The least share of the CPU's speed, whatever the link takes of its memory."""

GATHER_THREADS = 4
"""Rows of a table are read by as many threads as blocks are."""


@dataclass(frozen=True, slots=True)
class ComputeTime:
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
        compute_slowdown: times as long as alone that compute takes, since reads go on beside it.
        disk_slowdown: times as long as alone that reads take, since products go on beside them; `hardware` has it already.
    """

    def __init__(
        self, hardware: HardwareProfile, dtype: str, compute_slowdown: float = 1.0, disk_slowdown: float = 1.0
    ) -> None:
        self.hardware = hardware
        self.compute_slowdown, self.disk_slowdown = compute_slowdown, disk_slowdown
        self._dtype = dtype
        self._known: dict[tuple[Work, bool], ComputeTime] = {}

    def slowed(self, compute: float, disk: float) -> "CostModel":
        """The costs while compute takes so many times as long as here, and reads."""
        alone = self.hardware.disk_read
        slower = replace(alone, bytes_per_second=alone.bytes_per_second / disk, latency_seconds=alone.latency_seconds * disk)
        return CostModel(replace(self.hardware, disk_read=slower), self._dtype, compute, disk)

    def module(self, work: Work, on_host: bool = False) -> ComputeTime:
        """The time of `work`: on the device, or on the CPU beside it."""
        known = self._known.get((work, on_host))
        if known is None:
            known = self._known[work, on_host] = self._span(work, self.hardware.host if on_host else self.hardware.computes_on)
        return known

    def hybrid(self, module: ModuleWork, block: PlacedBlock, cpu_percent: int, copying_seconds: float) -> ComputeTime:
        """A layer that the device and the CPU compute together, each its rows of every product.

        What goes into a product is brought to the CPU first and its rows back afterwards. A device that computes behind
        the host's back does so meanwhile; another one before or after.
        """
        share = sum(weight.host_rows(cpu_percent) * weight.row_bytes for weight in block.divisible) / block.stored_bytes
        ours, theirs = module.work.shared_out(share)
        device, host = self.module(ours).compute_seconds, self.on_host(theirs, copying_seconds)
        rows = max((rows for rows, _ in module.work.products), default=1)
        hops = sum(self._hop_seconds(weight, rows, cpu_percent) for weight in block.divisible)
        if self.hardware.computes_on.asynchronous:
            seconds = max(device, host + hops)
        else:
            seconds = device + host + hops
        return ComputeTime(seconds, seconds)

    def _hop_seconds(self, weight: DivisibleWeight, rows: int, cpu_percent: int) -> float:
        assert self.hardware.d2h is not None
        assert self.hardware.h2d is not None
        there = self.hardware.d2h.seconds(rows * weight.row_bytes)
        return there + self.hardware.h2d.seconds(rows * weight.host_rows(cpu_percent) * weight.element_bytes)

    def on_host(self, work: Work, copying_seconds: float) -> float:
        """The CPU's time for `work`, of which the link copies from its memory for `copying_seconds`.

        Both read the same memory: what the copies take of its bandwidth, the CPU lacks (HeteGen, arXiv 2403.01164).
        """
        seconds = self.module(work, on_host=True).compute_seconds
        if self.hardware.h2d is None or copying_seconds <= 0 or not seconds:
            return seconds
        weights = sum(flops / rows / 2 for rows, flops in work.products)
        wanted = (weights * DTYPE_BYTES.get(self._dtype, 2) + work.traffic_bytes) / seconds
        given = self.hardware.host.memory_bytes_per_second - self.hardware.h2d.bytes_per_second
        pace = min(1.0, max(_LEAST_SHARE, given / wanted)) if wanted else 1.0
        done = min(seconds, copying_seconds * pace)
        return done / pace + seconds - done

    def gather_seconds(self, module: ModuleWork) -> float:
        """Reading the looked-up rows from disk, one request a row."""
        return self.hardware.disk_read.latency_seconds * -(-module.gathered_rows // GATHER_THREADS)

    def _span(self, work: Work, processor: Processor) -> ComputeTime:
        matrix = sum(processor.matrix_seconds(flops, rows, self._dtype) for rows, flops in work.products)
        # Attention and element-wise work: the larger of its arithmetic and its memory traffic (roofline).
        best_rate = max(point.flops_per_second for points in processor.matrix_rates.values() for point in points)
        other = max(work.other_flops / best_rate, work.traffic_bytes / processor.memory_bytes_per_second)
        submit, matrix, other = (
            seconds * self.compute_slowdown for seconds in (work.operations * processor.operation_seconds, matrix, other)
        )
        if processor.asynchronous:
            return ComputeTime(submit, max(submit, matrix + other))
        return ComputeTime(submit + matrix + other, submit + matrix + other)
