"""What became of the experts of a session, for its report."""

from collections.abc import Sequence
from dataclasses import asdict

from offload.model.experts import ExpertsUnit
from offload.moe.routing_log import RoutingLog
from offload.moe.streaming import ExpertTally
from offload.report.experts import ExpertUse, LayerExperts
from offload.scheduler.plan_sections import ExpertsPlan


def expert_use(
    plan: ExpertsPlan, units: Sequence[ExpertsUnit], tally: ExpertTally, log: RoutingLog, minimum: int, method: tuple[str, str]
) -> ExpertUse:
    """Sum up how experts were cached, loaded and predicted so far.

    Args:
        minimum: slots that a layer is sure of.
        method: what decides which experts stay, and what becomes of a miss.
    """
    accuracy = tally.accuracy
    layers = [
        LayerExperts(unit.key, layer.choices, layer.hits, layer.copies, layer.copied_bytes, layer.computed_on_cpu)
        for unit, layer in zip(units, tally.layers, strict=True)
    ]
    return ExpertUse(
        policy=method[0],
        misses=method[1],
        slots=plan.slots,
        slot_bytes=plan.slot_bytes,
        experts=sum(unit.count for unit in units),
        layers=layers,
        belady=asdict(log.bound(plan.slots, minimum)),
        prefetches=tally.prefetches,
        prefetches_used=tally.prefetches_used,
        recall=accuracy.found / accuracy.asked if accuracy.asked else None,
        recall_at_2k=accuracy.found_at_2k / accuracy.asked if accuracy.asked else None,
    )
