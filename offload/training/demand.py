"""What training demands of a plan."""

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from offload.budgets import Budgets
from offload.model.blocks import StoredSize, Structure, Unit, estimated_size, find_structure
from offload.planning.describe import model_spec
from offload.planning.fit import Demand, FittedPlan, fit
from offload.scheduler.model_spec import ActivationSizes, Workload
from offload.training.chosen import chosen_parameters, held_parameters
from offload.training.memory import TrainingMemory, check_beside, check_whole, training_memory
from offload.training.options import CPU, NVME, Training

_WITHOUT_LIMIT = 1 << 62


def fit_training(
    model: nn.Module,
    training: Training,
    budgets: Budgets,
    workload: Workload,
    size_of: Callable[[Unit], StoredSize],
    activations: ActivationSizes | None,
) -> tuple[FittedPlan, TrainingMemory]:
    """Plan the model beside what training holds.

    Raises:
        BudgetTooSmall: if they do not fit together.
    """
    tokens, token_bytes = workload.batch_size * workload.total_tokens, 0 if activations is None else activations.token_bytes
    discrete = budgets.host_bytes is not None
    trained_ids = frozenset(id(value) for value in chosen_parameters(model, training))

    def memory_of(structure: Structure) -> TrainingMemory:
        return training_memory(model, training, tokens, token_bytes, structure, discrete)

    def trained_size(unit: Unit) -> StoredSize:
        """What a unit takes in the slots, from a file of states too."""
        goes_to_file = training.state_tier == NVME and any(id(value) in trained_ids for value in unit.parameters.values())
        return max(size_of(unit), estimated_size(unit), key=lambda size: size.slot_bytes) if goes_to_file else size_of(unit)

    def fitted_to(budgets: Budgets) -> FittedPlan:
        return fit(model, budgets, workload, trained_size, activations, demand)

    demand = Demand(
        allow_splits=False,
        # Nothing that is trained stays on a device whose memory the states do not share.
        candidates=frozenset[str]() if training.full and discrete else None,
        held=held_parameters(model, training, discrete),
        memory=memory_of,
    )
    if training.full and training.state_tier == CPU and not discrete:
        structure = find_structure(model)
        described = model_spec(model, structure, size_of, activations)
        check_whole(replace(described, workspace_bytes=budgets.workspace_bytes), budgets, workload, memory_of(structure))
    if training.state_tier == CPU and discrete and trained_ids:
        on_device = fitted_to(replace(budgets, host_bytes=_WITHOUT_LIMIT))
        check_beside(on_device, budgets, trained_ids, memory_of(on_device.structure))
    fitted = fitted_to(budgets)
    memory = memory_of(fitted.structure)
    # Whoever plans again for what is added to the model has so much less.
    always_resident_bytes = fitted.spec.always_resident_bytes + memory.device_bytes(budgets)
    return replace(fitted, spec=replace(fitted.spec, always_resident_bytes=always_resident_bytes)), memory
