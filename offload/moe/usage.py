"""What became of the experts of a session, for its report."""

from dataclasses import asdict

from offload.moe.component import ExpertComponent
from offload.report.experts import ExpertUse, LayerExperts
from offload.scheduler.plan import Plan


def expert_use(experts: ExpertComponent, plan: Plan) -> ExpertUse:
    """Sum up how experts were cached, loaded and predicted so far."""
    tally, accuracy = experts.tally, experts.tally.accuracy
    layers = [
        LayerExperts(unit.key, layer.choices, layer.hits, layer.copies, layer.copied_bytes, layer.computed_on_cpu)
        for unit, layer in zip(experts.units, tally.layers, strict=True)
    ]
    return ExpertUse(
        policy=experts.policy,
        misses=experts.misses,
        slots=plan.experts.slots,
        slot_bytes=plan.experts.slot_bytes,
        experts=experts.spec.total,
        layers=layers,
        belady=asdict(experts.log.bound(plan.experts.slots, experts.minimum(plan))),
        prefetches=tally.prefetches,
        prefetches_used=tally.prefetches_used,
        recall=accuracy.found / accuracy.asked if accuracy.asked else None,
        recall_at_2k=accuracy.found_at_2k / accuracy.asked if accuracy.asked else None,
    )
