"""Which components a session has: what was asked for, and what its plan needs."""

from collections.abc import Mapping

from offload.config import ROUNDING
from offload.kv.component import KvComponent
from offload.model.experts import ExpertPieces
from offload.moe.component import ExpertComponent, rule_for_misses
from offload.runtime.component import Component
from offload.runtime.executor import LayerExecutor
from offload.runtime.machine import Machine
from offload.session.prepare import Prepared
from offload.session.request import Request
from offload.session.residency import Residency
from offload.training.component import TrainingComponent


def components_of(
    request: Request,
    prepared: Prepared,
    machine: Machine,
    executor: LayerExecutor,
    residency: Residency,
    pieces: Mapping[str, ExpertPieces],
    source_key: str | None,
) -> list[Component]:
    """Make the components of a session, in the order in which they take memory.

    Args:
        pieces: where experts lie whose parameters are placeholders, by parameter.
        source_key: stands for the checkpoint; None for a model that no file is known of.
    """
    components: list[Component] = []
    fitted, plan = prepared.fitted, prepared.plan
    if fitted.experts:
        assert fitted.spec.experts is not None
        options, may_round = request.experts, request.exactness == ROUNDING
        hardware = None if prepared.predictor is None else prepared.predictor.hardware
        rule = rule_for_misses(options.misses, may_round, plan, fitted.spec.experts, fitted.experts, hardware)
        components.append(
            ExpertComponent(machine, executor, residency, fitted.spec.experts, fitted.experts, pieces, options, rule)
        )
    if request.training is not None and prepared.memory is not None:
        at_once = request.uses_session_optimizer
        components.append(TrainingComponent(request.training, at_once, machine, executor, residency, prepared.memory))
    workload = prepared.workload
    components.append(KvComponent(machine, request.kv, plan, fitted.spec, workload, residency, prepared.predictor, source_key))
    return components
