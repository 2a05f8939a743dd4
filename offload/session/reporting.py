"""What a session reports: collected from its machine, its plan and its components."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from offload.config import IDENTICAL, ROUNDING
from offload.planning.compare import compare
from offload.planning.predictor import PlanGoal, Predictor
from offload.report.comparison import Comparison
from offload.report.facts import LEAST_JUDGED_BYTES, LinkUse, Peak, phase_uses
from offload.report.live import Snapshot
from offload.report.report import Report
from offload.runtime.executor import LayerExecutor
from offload.runtime.machine import Machine
from offload.runtime.recorder import tracing_use
from offload.scheduler.phases import BACKWARD, DECODE, PREFILL, STANDALONE
from offload.session.residency import Residency
from offload.storage.errors import gib
from offload.storage.host_buffer import HostBuffer
from offload.storage.process_memory import major_faults
from offload.version import __version__

_EXCESS = 1.05
"""Times the predicted peak: more is told."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is reported on.

    Attributes:
        name: of the model, or where it came from.
        process_bytes: what the process held before the session.
        held_bytes: of these, weights that the session moved.
        major_faults: of the process before the session.
        exactness: of the weights themselves.
    """

    name: str
    parameters: int
    weight_bytes: int
    process_bytes: int
    held_bytes: int
    major_faults: int
    exactness: str = IDENTICAL

    @classmethod
    def of(cls, model: nn.Module, name: str, process_bytes: int, held_bytes: int) -> "Subject":
        """Count a model."""
        counts = [(value.numel(), value.nbytes) for value in model.parameters()]
        parameters, nbytes = sum(count for count, _ in counts), sum(size for _, size in counts)
        return cls(name, parameters, nbytes, process_bytes, held_bytes, major_faults())


class Reporter:
    """Reports on one session.

    Args:
        goal: what the plan is weighed by now.
        predictor: None where the machine was not measured.
    """

    def __init__(
        self,
        machine: Machine,
        executor: LayerExecutor,
        residency: Residency,
        subject: Subject,
        goal: Callable[[], PlanGoal],
        predictor: Predictor | None,
    ) -> None:
        self._machine = machine
        self._executor = executor
        self._residency = residency
        self._subject = subject
        self._goal = goal
        self._predictor = predictor

    def report(self, may_measure: bool) -> Report:
        """Sum up what happened so far.

        Args:
            may_measure: the disk may be measured for a moment, into the slots.
        """
        machine, plan, subject = self._machine, self._residency.plan, self._subject
        lent = self._lent_for_measuring() if may_measure else None
        links = machine.meters.link_uses(machine.host.reads, machine.host.writes, machine.host.reader, lent)
        usages = {component.name: component.usage() for component in self._residency.components}
        kv: Any = usages.get("kv") or {}
        experts: Any = usages.get("experts")
        phases = phase_uses(machine.clock.phases)
        return Report(
            model=subject.name,
            device=machine.device.name,
            engine=machine.host.engine.name,
            exactness=self._exactness(),
            parameters=subject.parameters,
            weight_bytes=subject.weight_bytes,
            blocks={
                "resident": len(plan.weights.resident),
                "streamed_from_cpu_memory": len(plan.weights.in_host_memory),
                "streamed_from_disk": len(plan.weights.streamed) - len(plan.weights.in_host_memory),
                "row_fetched": len(plan.weights.row_fetched),
                "computed_on_cpu": len(plan.weights.computed_on_host),
                "cpu_gpu_split": len(plan.weights.cpu_gpu_split),
            },
            parts={
                "cpu_percent": plan.weights.cpu_percent,
                "micro_batch": plan.splits.micro_batch,
                "decode_micro_batch": plan.splits.decode_micro_batch,
                "prefill_chunk": plan.splits.prefill_chunk,
            },
            slots={"count": plan.weights.slot_count, "bytes": plan.weights.slot_bytes},
            streamed_bytes_per_pass=plan.weights.streamed_bytes,
            kv=kv,
            tiers=machine.meters.tier_uses(subject.process_bytes),
            links=links,
            prefill=phases[PREFILL],
            decode=phases[DECODE],
            backward=phases[BACKWARD],
            standalone=phases[STANDALONE],
            prediction=self._compared(links),
            peak=self._peak(),
            tracing=tracing_use(machine.host.recorder.trace),
            process_bytes=subject.process_bytes,
            peak_device_bytes=machine.device.peak_bytes(),
            fallbacks=self._notes(),
            experts=experts,
            major_faults=major_faults() - subject.major_faults,
            loading_seconds=machine.clock.loading_seconds,
            versions=_versions(),
        )

    def snapshot(self) -> Snapshot:
        """Say where the session stands: cheap, and from any thread."""
        machine = self._machine
        machine.copies.collect()
        return Snapshot(
            phase=machine.clock.phase,
            tiers=machine.meters.tier_uses(self._subject.process_bytes),
            links=machine.meters.link_sums(machine.host.reads, machine.host.writes),
            phases=phase_uses(dict(machine.clock.phases)),
        )

    def _exactness(self) -> str:
        levels = [self._subject.exactness, *(component.exactness for component in self._residency.components)]
        lossy = [level for level in levels if level not in (IDENTICAL, ROUNDING)]
        if lossy:
            return "; ".join((lossy[0], *(level.removeprefix("lossy: ") for level in lossy[1:])))
        rounds = self._residency.plan.rounds or self._residency.compiled.used or ROUNDING in levels
        return ROUNDING if rounds else IDENTICAL

    def _compared(self, links: Mapping[str, LinkUse]) -> Comparison | None:
        """Compare what was predicted for the work so far with what was measured; None without a hardware profile.

        Args:
            links: what went over each, so far.
        """
        given = {
            name: use.bytes_per_second
            for name, use in links.items()
            if use.bytes_per_second and use.bytes >= LEAST_JUDGED_BYTES
        }
        phases = self._machine.clock.phases
        if self._predictor is None or phases[BACKWARD].passes:
            return None
        return compare(self._predictor, self._residency.plan, self._residency.spec, phases, self._goal(), given)

    def _lent_for_measuring(self) -> memoryview | None:
        """Memory that the disk may be measured into without passing a budget."""
        wanted = self._machine.host.reader.shape.memory_bytes
        lent = self._executor.lend(wanted)
        if lent is None and self._machine.discrete:
            free = self._machine.host.ledger.free_bytes
            lent = HostBuffer(wanted).memory if free is None or free >= wanted else None
        return lent

    def _notes(self) -> list[str]:
        placement = self._residency.placement
        whole = [
            f"embedding {table.key} is not only indexed by rows; the whole table is loaded on every use"
            for table in placement.tables.values()
            if table.was_read_whole
        ]
        components = [note for component in self._residency.components for note in component.notes]
        host = self._machine.host
        said = (*host.notes.sentences, *whole, *components, *host.engine.fallbacks, *self._excess())
        return list(dict.fromkeys(said))

    def _excess(self) -> list[str]:
        peak = self._peak()
        more_bytes = (peak.measured_bytes or 0) - peak.predicted_bytes
        if more_bytes <= max(LEAST_JUDGED_BYTES, (_EXCESS - 1) * peak.predicted_bytes):
            return []
        return [
            f"{gib(more_bytes)} more memory was held than predicted: what kernels keep for themselves (experts' products on a "
            "CPU above all) and what backward holds of a layer is not in the budget; give a smaller one if memory is short"
        ]

    def _peak(self) -> Peak:
        extra_bytes = 0
        if not self._machine.discrete:
            extra_bytes = sum(component.held_bytes for component in self._residency.components)
        subject = self._subject
        return self._machine.meters.peak(self._residency.plan, subject.process_bytes - subject.held_bytes, extra_bytes)


def _versions() -> dict[str, str]:
    return {
        "offload": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
    }
