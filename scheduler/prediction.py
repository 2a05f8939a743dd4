"""What a plan will give: time of prefill and of a token, and what holds them back."""

from collections.abc import Sequence
from dataclasses import dataclass

from offload.scheduler.contention import settle
from offload.scheduler.cost import CostModel
from offload.scheduler.model_spec import ModelSpec
from offload.scheduler.plan import Plan
from offload.scheduler.simulator import Simulation
from offload.scheduler.trace import PASS, Trace
from offload.scheduler.work import PassWork

_DECODE_PASSES = 4
"""The first ones still find what prefill left in the slots; the last one is what goes on."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one plan gives on one machine for one workload.

    Attributes:
        prefill_seconds: the first pass, with nothing loaded ahead: the time to the first token, but for sampling it.
        seconds_per_token: of a decode pass, once it goes on and on (TPOT).
        tokens_per_second: of all sequences of the batch.
        decode_shares: where the time of a decode pass goes, by cause; they add up to 1.
        bound: the resource that holds decode back: `disk`, `h2d`, `compute`, or `cpu` where layers are computed there.
        hardware_id: of the profile.
        exact_work: False where the model's work was estimated from sizes.
        disk_slowdown: times as long as alone that reads of decode take, since the CPU computes beside them.
    """

    prefill_seconds: float
    seconds_per_token: float
    tokens_per_second: float
    decode_shares: dict[str, float]
    bound: str
    hardware_id: str
    exact_work: bool
    disk_slowdown: float = 1.0

    def total_seconds(self, new_tokens: int) -> float:
        """Seconds of a prompt and its answer."""
        return self.prefill_seconds + max(0, new_tokens - 1) * self.seconds_per_token


@dataclass(frozen=True, slots=True)
class WhatIf:
    """A change, and how many times as fast a prompt with its answer would be."""

    change: str
    speedup: float


@dataclass(frozen=True, slots=True)
class _Passes:
    """What was simulated: of a prefill, of the decode passes after it, and of the last of these."""

    prefill: Trace
    decode: Trace
    last: Trace


def predict(
    plan: Plan,
    model: ModelSpec,
    cost: CostModel,
    prefill: Sequence[PassWork],
    decode: PassWork,
    hit_rate: float | None = None,
) -> Prediction:
    """Simulate the passes of a prefill, and some of decode.

    Args:
        hit_rate: of experts that are brought one by one; None for what is to be expected.
    """

    def run(cost: CostModel) -> _Passes:
        simulation = Simulation(plan, model, cost, hit_rate)
        starts = []
        for part in (*prefill, *[decode] * _DECODE_PASSES):
            starts.append(len(simulation.trace.spans))
            simulation.run(part)
        spans, settled = simulation.trace.spans, starts[len(prefill)]
        return _Passes(*(Trace("simulator", part) for part in (spans[:settled], spans[settled:], spans[starts[-1] :])))

    first_cost, later_cost = settle(cost, lambda each: run(each).prefill), settle(cost, lambda each: run(each).decode)
    passes = run(later_cost)
    first = passes if first_cost is later_cost else run(first_cost)
    prefill_seconds = sum(span.seconds for span in first.prefill.on(PASS))
    last = passes.last
    settled = last.on(PASS)[-1].seconds
    causes = last.attribution("decode")
    total = sum(causes.values()) or 1.0
    shares = {cause: seconds / total for cause, seconds in causes.items()}
    return Prediction(
        prefill_seconds=prefill_seconds,
        seconds_per_token=settled,
        tokens_per_second=decode.batch_size / settled if settled else 0.0,
        decode_shares=shares,
        bound=_resource(max(shares, key=lambda cause: shares[cause])),
        hardware_id=cost.hardware.hardware_id,
        exact_work=decode.exact and all(part.exact for part in prefill),
        disk_slowdown=later_cost.disk_slowdown,
    )


def _resource(cause: str) -> str:
    return cause.removeprefix("wait for ") if cause != "between blocks" else "compute"
