"""What training demands of a plan."""

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from offload.config import Budgets
from offload.model.blocks import Unit, estimated_slot_bytes
from offload.planning.fit import Demand, FittedPlan, fit
from offload.scheduler.kv_pages import KvDemand
from offload.scheduler.model_spec import ActivationSizes, Workload
from offload.training.memory import TrainingMemory, training_memory
from offload.training.options import CPU, NVME, Training


def fit_training(
    model: nn.Module,
    training: Training,
    budgets: Budgets,
    workload: Workload,
    slot_bytes: Callable[[Unit], int],
    activations: ActivationSizes | None,
    kv: KvDemand,
) -> tuple[FittedPlan, TrainingMemory]:
    """Plan the model beside what training holds.

    Raises:
        BudgetTooSmall: if they do not fit together.
    """
    token_bytes = 0 if activations is None else activations.token_bytes
    memory = training_memory(model, training, workload.batch_size * workload.total_tokens, token_bytes)
    discrete = budgets.host_bytes is not None
    if training.activation_tier == CPU and discrete:
        # They wait in CPU memory, which is charged as they come.
        memory = replace(memory, activation_bytes=0, reserved_bytes=0)
    in_files = training.full and training.state_tier == NVME
    fitted = fit(
        model,
        memory.left_of(training, budgets),
        workload,
        (lambda unit: max(slot_bytes(unit), estimated_slot_bytes(unit))) if in_files else slot_bytes,
        activations,
        # Nothing that is trained stays on a device whose memory the states do not share.
        Demand(kv=kv, allow_splits=False, candidates=frozenset[str]() if training.full and discrete else None),
    )
    memory.check(fitted.plan, training, budgets, sum(value.nbytes for value in model.parameters()))
    # Whoever plans again for what is added to the model has so much less.
    held_bytes = memory.activation_bytes + (0 if discrete else memory.host_bytes)
    always_resident_bytes = fitted.spec.always_resident_bytes + held_bytes
    return replace(fitted, spec=replace(fitted.spec, always_resident_bytes=always_resident_bytes)), memory
