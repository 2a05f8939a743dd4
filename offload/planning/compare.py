"""Predicts what a session was asked so far, for comparison with what was measured."""

from collections.abc import Mapping
from dataclasses import replace

from offload.planning.predictor import PlanGoal, Predictor, drifted_hardware
from offload.report.comparison import Comparison
from offload.scheduler.model_spec import ModelSpec
from offload.scheduler.phases import DECODE, PREFILL, PhaseTimes
from offload.scheduler.plan import Plan


def compare(
    predictor: Predictor,
    plan: Plan,
    spec: ModelSpec,
    phases: Mapping[str, PhaseTimes],
    order: PlanGoal,
    given: Mapping[str, float],
) -> Comparison | None:
    """Compare for what was asked of the model so far; None if nothing was.

    Args:
        order: what the session was made for.
        given: bytes a second that the links gave.
    """
    predicted = predictor.predict_observed(plan, spec, phases)
    if predicted is None:
        return None
    decode = phases.get(DECODE)
    asked = replace(order, prompt_tokens=phases[PREFILL].pass_tokens, new_tokens=1 + (decode.passes if decode else 0))
    what_if = predictor.what_if(spec, asked, predicted)
    # What the disk gave beside the products, as what it would have given alone.
    alone = {link: rate * (predicted.disk_slowdown if link == "disk" else 1.0) for link, rate in given.items()}
    hardware, drift = drifted_hardware(predictor.hardware, alone)
    undrifted = predictor.predict_observed(plan, spec, phases, hardware)
    assert undrifted is not None
    return Comparison.of(predicted, undrifted, drift, what_if, phases)
