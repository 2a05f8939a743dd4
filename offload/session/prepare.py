"""From a request and a model to a plan: the one way, for sessions and for `offload plan`."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from offload.budgets import Budgets
from offload.config import ROUNDING
from offload.kv.demand import kv_demand, kv_notes
from offload.kv.options import KvOptions
from offload.model.blocks import StoredSize, Unit
from offload.model.quantised.weights import decoding_notes
from offload.moe.options import IN_LAYERS, ExpertOptions
from offload.planning.describe import count_activations, longest_sequence, takes_tokens
from offload.planning.fit import Demand, ExpertGranularity, FittedPlan, fit
from offload.planning.pass_splits import check_parts
from offload.planning.plan_file import given_plan
from offload.planning.predictor import PlanGoal, Predictor
from offload.scheduler.hardware import HardwareProfile
from offload.scheduler.model_spec import ActivationSizes, Workload
from offload.scheduler.plan import Plan
from offload.scheduler.prediction import Prediction
from offload.storage.errors import BudgetTooSmall, ConfigError
from offload.training.demand import fit_training
from offload.training.memory import TrainingMemory
from offload.training.options import Training

_DEFAULT_TOKENS = 2048

_LEAST_TOKENS = 64
"""Less is not worth reserving for."""

Fitted = TypeVar("Fitted")


@dataclass(frozen=True, slots=True)
class PlanInput:
    """What a plan is made for.

    Attributes:
        workload: what memory is reserved for.
        new_tokens: of each sequence, made by decoding.
        exactness: `identical` or `rounding`.
        hardware: the machine; None if it was not measured.
        plan: given by the user, to be checked; None to make one.
    """

    budgets: Budgets
    workload: Workload
    new_tokens: int
    exactness: str
    experts: ExpertOptions
    kv: KvOptions
    training: Training | None = None
    hardware: HardwareProfile | None = None
    plan: Plan | None = None

    @property
    def granularity(self) -> ExpertGranularity:
        """Whether experts are cached one by one. Backward needs all experts of a layer: training streams layers."""
        if self.training is not None or self.experts.policy == IN_LAYERS:
            return ExpertGranularity.PER_LAYER
        if self.plan is not None:
            return ExpertGranularity.PER_EXPERT if self.plan.experts.slots else ExpertGranularity.PER_LAYER
        return ExpertGranularity.AUTO


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan, and what it was made from.

    Attributes:
        plan: the one to run by: the user's, the fastest, or that of the fit.
        workload: as the plan splits it.
        goal: what plans were weighed by.
        predictor: None where the machine was not measured.
        prediction: of the plan; None where nothing was weighed.
        memory: what training holds; None without.
        notes: a sentence for everything that is not as one would expect.
    """

    fitted: FittedPlan
    plan: Plan
    workload: Workload
    goal: PlanGoal
    predictor: Predictor | None
    prediction: Prediction | None
    memory: TrainingMemory | None
    notes: tuple[str, ...]


def workload_of(model: nn.Module, batch_size: int, max_tokens: int | None) -> Workload:
    """The workload to reserve for, where `max_tokens` may be left to what the model takes."""
    longest = longest_sequence(getattr(model, "config", None)) or _DEFAULT_TOKENS
    tokens = max_tokens or (min(longest, _DEFAULT_TOKENS) if takes_tokens(model) else 1)
    return Workload(batch_size, tokens, tokens)


def workloads(asked: Workload, may_shrink: bool) -> Iterator[Workload]:
    """What to reserve for: as asked, or where nobody asked, for less and less of it."""
    yield asked
    tokens = asked.total_tokens
    while may_shrink and tokens > _LEAST_TOKENS:
        tokens = max(_LEAST_TOKENS, tokens // 2)
        yield replace(asked, total_tokens=tokens, pass_tokens=tokens)


def first_that_fits(
    choices: Iterable[Workload], attempt: Callable[[Workload], tuple[Plan, Fitted]], may_round: bool
) -> tuple[Workload, Fitted]:
    """The first workload with which the attempt succeeds, and what came of it; one that rounds only where that is allowed.

    Where all round, it is the first of them.

    Raises:
        BudgetTooSmall: if none does: of the last one.
    """
    refusal, rounded = None, None
    for workload in choices:
        try:
            plan, fitted = attempt(workload)
        except BudgetTooSmall as error:
            refusal = error
            continue
        if may_round or not plan.rounds:
            return workload, fitted
        rounded = rounded or (workload, fitted)
    if rounded is not None:
        return rounded
    assert refusal is not None
    raise refusal


def activations_of(model: nn.Module, workload: Workload) -> ActivationSizes | None:
    """Count what a pass holds; None where that cannot be counted."""
    return count_activations(model, workload) if takes_tokens(model) else None


def fit_input(
    model: nn.Module,
    given: PlanInput,
    size_of: Callable[[Unit], StoredSize],
    activations: ActivationSizes | None,
    granularity: ExpertGranularity,
) -> tuple[FittedPlan, TrainingMemory | None]:
    """Make a plan that fits; the model may be an outline without values.

    Raises:
        BudgetTooSmall: if none does; its `least_bytes` would do.
        ConfigError: if the model cannot do what was asked for.
    """
    workload = given.workload
    if given.training is not None:
        return fit_training(model, given.training, given.budgets, workload, size_of, activations)
    kv = kv_demand(model, workload, given.kv, given.exactness)
    fitted = fit(model, given.budgets, workload, size_of, activations, Demand(granularity, kv))
    return fitted, None


def prepare(
    model: nn.Module,
    given: PlanInput,
    size_of: Callable[[Unit], StoredSize],
    activations: ActivationSizes | None,
    granularity: ExpertGranularity | None = None,
    outline: nn.Module | None = None,
    always_search: bool = False,
) -> Prepared:
    """Make the plan to run by.

    Args:
        size_of: what a unit's block takes, in files and in the slots.
        activations: as `activations_of` gives them.
        granularity: of experts; None for what was asked.
        outline: the model without values, if there is one: it is copied otherwise.
        always_search: weigh plans where nothing but the fit's is possible, too, for their prediction.

    Raises:
        BudgetTooSmall: if none fits; its `least_bytes` would do.
        PlanError, ConfigError: if the plan that was given, or what else was asked for, cannot be.
    """
    fitted, memory = fit_input(model, given, size_of, activations, granularity or given.granularity)
    predictor = _predictor(model, fitted, given.hardware, outline)
    plan, prediction = fitted.plan, None
    # What had to be split is; where rounding is allowed, all ways are weighed.
    kept = plan.kept_as if given.exactness == ROUNDING else plan.asked
    goal = goal_of(given, kept(given.workload))
    if given.plan is not None:
        plan = _given(model, given, fitted)
    elif predictor is not None and given.training is None and (always_search or _has_choices(given, fitted)):
        plan, prediction = predictor.best(fitted.spec, goal, paged=fitted.paged)
    notes = [*fitted.fallbacks, *kv_notes(model, fitted, given.workload, given.kv, given.exactness)]
    if given.budgets.host_bytes is None:
        streamed = {*plan.weights.streamed, *plan.weights.row_fetched}
        notes += decoding_notes({block.codec for block in fitted.spec.blocks if block.key in streamed})
    return Prepared(fitted, plan, plan.asked(given.workload), goal, predictor, prediction, memory, tuple(notes))


def goal_of(given: PlanInput, workload: Workload) -> PlanGoal:
    """What a plan is weighed by: a prompt and its answer, as long as the workload."""
    new_tokens = min(given.new_tokens, workload.total_tokens - 1)
    prompt_tokens = max(1, workload.total_tokens - new_tokens)
    return PlanGoal(workload, prompt_tokens, new_tokens, given.budgets, given.exactness)


def _has_choices(given: PlanInput, fitted: FittedPlan) -> bool:
    encoded = any(block.encoded_bytes for block in fitted.spec.blocks)
    return given.budgets.host_bytes is not None or given.exactness == ROUNDING or bool(fitted.paged) or encoded


def _predictor(
    model: nn.Module, fitted: FittedPlan, hardware: HardwareProfile | None, outline: nn.Module | None
) -> Predictor | None:
    if hardware is None:
        return None
    dtype = str(next((value.dtype for value in model.parameters()), torch.float32)).removeprefix("torch.")
    return Predictor(model, fitted.by_submodule, hardware, dtype, outline)


def _given(model: nn.Module, given: PlanInput, fitted: FittedPlan) -> Plan:
    assert given.plan is not None
    plan = given_plan(given.plan, fitted.spec, given.workload, given.budgets, given.exactness)
    check_parts(model, plan)
    if given.kv.asks_pages and not plan.kv.memory_bytes:
        raise ConfigError(
            "the plan keeps all keys and values on the device (kv.memory_bytes is 0): leave the options of the KV cache out, "
            "or make the plan with them"
        )
    return plan
