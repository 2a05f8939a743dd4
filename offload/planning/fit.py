"""From a model and its budgets to a plan, taking blocks apart where they are too large."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from torch import nn

from offload.config import IDENTICAL, ROUNDING, Budgets
from offload.kv.attention_backend import supports_custom_attention
from offload.kv.options import PLAIN, KvOptions
from offload.model.blocks import Structure, Unit, find_structure, has_submodules
from offload.model.experts import ExpertsUnit, find_experts, undecorated_experts
from offload.planning.describe import element_bytes_of, generates, kv_sizes, model_spec
from offload.planning.pass_splits import ways_to_split
from offload.scheduler.kv_pages import KvShape, PagedKv, cut, paged_ways
from offload.scheduler.model_spec import ActivationSizes, ModelSpec, Workload
from offload.scheduler.plan import Plan
from offload.scheduler.planner import make_plan
from offload.storage.blocks import BlockKey
from offload.storage.errors import BudgetTooSmall, ConfigError, PlanError, gib

_SHARED_ROOM = 1.5
"""Of what a batch with a common beginning takes."""


class ExpertGranularity(Enum):
    """Whether experts are brought one by one."""

    PER_LAYER = "they are part of their layers"
    AUTO = "one by one, unless the whole model fits"
    PER_EXPERT = "always"


@dataclass(frozen=True, slots=True)
class FittedPlan:
    """How a model is taken apart, and where its blocks go."""

    structure: Structure
    spec: ModelSpec
    plan: Plan
    by_submodule: frozenset[BlockKey]
    fallbacks: tuple[str, ...]
    experts: tuple[ExpertsUnit, ...] = ()
    """Those that are brought one by one."""
    paged: tuple[PagedKv, ...] = ()
    """Other ways to keep keys and values in pages, of the same exactness, where they are."""


def fit(
    model: nn.Module,
    budgets: Budgets,
    workload: Workload,
    slot_bytes: Callable[[Unit], int],
    activations: ActivationSizes | None,
    allow_splits: bool = True,
    candidates: frozenset[BlockKey] | None = None,
    experts: ExpertGranularity = ExpertGranularity.PER_LAYER,
    kv: KvOptions = PLAIN,
    exactness: str = IDENTICAL,
) -> FittedPlan:
    """Plan; where the budget is too small for the largest blocks, take those apart and plan again.

    Where nothing fits even so, the passes are taken apart, which is of level *rounding*, and said.

    Args:
        slot_bytes: what a unit's block takes in the slots.
        temporaries: of a pass, as counted; None to estimate them.
        in_parts: passes may be taken apart.
        candidates: the blocks that may stay on the device; None for all.
        experts: whether they are brought one by one.
        kv: what was asked of the KV cache.
        exactness: `identical` or `rounding`.

    Raises:
        BudgetTooSmall: if it is too small for the largest module that cannot be taken apart.
        ConfigError: if the KV cache cannot be kept as it was asked for.
    """
    paged = _paged(model, workload, kv, exactness)
    shares = kv.shared_tokens > 0 and supports_custom_attention(model)
    asked = kv.is_lossy or (bool(paged) and (shares or kv.memory_bytes is not None))
    if asked:
        workload, paged = replace(workload, paged=paged[0]), paged[1:]
    units = tuple(find_experts(model)) if experts is not ExpertGranularity.PER_LAYER else ()
    whole: FittedPlan | list[BudgetTooSmall] = []
    if units and experts is ExpertGranularity.AUTO:
        whole = _fitting(model, budgets, [workload], slot_bytes, activations, candidates, ())
        if isinstance(whole, FittedPlan) and not whole.plan.weights.streamed:
            return whole
    found = _fitting(model, budgets, [workload], slot_bytes, activations, candidates, units)
    if isinstance(found, FittedPlan):
        pieces = _in_pieces(found, workload, kv) if exactness != ROUNDING else []
        told = (*found.fallbacks, *pieces, *_unshared(model, found.plan, kv), *_other_experts(model, found, experts))
        return replace(found, fallbacks=told, paged=_smaller(paged, found.plan) if asked else ())
    if isinstance(whole, FittedPlan):
        # Of a model so small that single experts, read in whole units, take more than a layer.
        said = "single experts would take more than the budget has room for: whole layers are streamed"
        return replace(whole, fallbacks=(*whole.fallbacks, said))
    # The KV cache goes to lower tiers before passes are taken apart: in one piece, that is exact.
    below = [replace(workload, paged=way) for way in paged]
    exact = [way for way in below if way.paged is not None and not way.paged.segments]
    rest = [way for way in below if way not in exact]
    steps = [lambda: exact, lambda: rest]
    if allow_splits:
        steps[1:1] = [lambda: ways_to_split(model, workload)]
        steps += [lambda: _chunked(model, exact[-1:]), lambda: _chunked(model, rest[-1:])]
    # The state of other layers, which is written anew in each pass, comes last.
    steps += [lambda: _with_state_offload(exact[-1:]), lambda: _with_state_offload(rest[-1:])]
    for step in steps:
        ways = step()
        apart = _fitting(model, budgets, ways, slot_bytes, activations, candidates, units) if ways else []
        if isinstance(apart, FittedPlan):
            told = (*_forced(apart.plan), *_other_experts(model, apart, experts))
            others = [way.paged for way in ways if way.paged is not None]
            return replace(apart, fallbacks=(*apart.fallbacks, *told), paged=_smaller(others, apart.plan))
        found += apart
    # Taken apart further, a model may need more: what lies beside the parts stays on the device.
    raise min(found, key=lambda refusal: refusal.least_bytes)


def _smaller(ways: Sequence[PagedKv], plan: Plan) -> tuple[PagedKv, ...]:
    """Those that are read as in the plan, and leave more memory to weights."""
    return tuple(way for way in ways if way.segments == plan.kv.segments and way.memory_bytes < plan.kv.memory_bytes)


def _unshared(model: nn.Module, plan: Plan, kv: KvOptions) -> list[str]:
    """That what a batch begins with is not read once for all of it."""
    if not kv.shared_tokens or plan.kv.segments:
        return []
    return [
        f"what all sequences begin with is computed and read for each of them: the attention of {type(model).__name__} is its "
        "own code, or no layer keeps all tokens"
    ]


def _in_pieces(fitted: FittedPlan, workload: Workload, kv: KvOptions) -> list[str]:
    """That the memory that was asked for is too little for a layer in one piece, and what would do."""
    shape = fitted.spec.kv
    if not fitted.plan.kv.segments or kv.is_lossy or shape is None:
        return []
    try:
        cut(shape, workload.batch_size, workload.total_tokens, fitted.plan.kv.memory_bytes, False)
    except BudgetTooSmall as error:
        return [
            f"{gib(fitted.plan.kv.memory_bytes)} for the KV cache have no room for a layer in one piece: attention reads it "
            f"piece by piece, exactness is rounding; from kv_memory={error.least_bytes} ({gib(error.least_bytes)}) on it is "
            "identical"
        ]
    return []


def _forced(plan: Plan) -> list[str]:
    """What was done because nothing else fits."""
    said = []
    if plan.kv.memory_bytes:
        said.append("the KV cache does not fit the budget: a part of it goes to lower tiers")
    if plan.rounds:
        said.append(f"nothing else fits the budget: {' and '.join(plan.rounds)}; exactness is rounding")
    return said


def _chunked(model: nn.Module, workloads: Sequence[Workload]) -> list[Workload]:
    """A cache in pages is not cut by sequences."""
    return [way for workload in workloads for way in ways_to_split(model, workload) if not way.micro_batch]


def _with_state_offload(workloads: Sequence[Workload]) -> list[Workload]:
    return [replace(way, paged=replace(way.paged, state_offload=True)) for way in workloads if way.paged is not None]


def _paged(model: nn.Module, workload: Workload, kv: KvOptions, exactness: str) -> list[PagedKv]:
    """The ways to keep the KV cache in pages, the best first; none where that was asked for and everything fits anyway.

    Raises:
        ConfigError: if a method was asked for that the model cannot take.
        BudgetTooSmall: if the memory that was asked for is too little.
    """
    element_bytes = element_bytes_of(model)
    shape = kv_sizes(getattr(model, "config", None), element_bytes).shape if generates(model) else None
    if shape is None:
        if kv.is_lossy or kv.memory_bytes is not None:
            raise ConfigError(
                f"{type(model).__name__} has no layers that keep keys and values of all tokens (they are sliding, recurrent, "
                "or there are none), so that kv_memory and kv_policy say nothing: leave them out"
            )
        return []
    own_attention = supports_custom_attention(model)
    shares = kv.shared_tokens > 0 and own_attention
    if kv.memory_bytes is not None and not (kv.is_lossy or shares) and _whole(workload, shape) <= kv.memory_bytes:
        return []
    if kv.method.takes_budget and not own_attention:
        raise ConfigError(
            f"kv_policy={kv.policy!r} chooses what a query sees, and the attention of {type(model).__name__} is its own code, "
            "which cannot be told; give kv_policy='none', 'int8' or 'int4'"
        )
    segments = [False, True] if own_attention else [False]
    if kv.method.takes_budget or shares:
        segments = [True]
    elif exactness == ROUNDING:
        segments.reverse()
    percent = kv.stored_percent(element_bytes)
    sizes = workload.batch_size, workload.total_tokens
    share = 1.0
    if shares:
        share *= 1 - (1 - 1 / sizes[0]) * min(kv.shared_tokens, sizes[1]) / sizes[1]
        # Each layer fills two pages more: the beginning's last one, and the first one after it.
        share *= _SHARED_ROOM
    return paged_ways(
        shape,
        *sizes,
        kv.memory_bytes,
        segments,
        percent,
        share,
        kv.tokens_a_page(sizes[1]),
        kv.index_share,
        anyway=kv.is_lossy or shares,
    )


def _whole(workload: Workload, shape: KvShape) -> int:
    return workload.batch_size * workload.total_tokens * shape.all_token_bytes


def _fitting(
    model: nn.Module,
    budgets: Budgets,
    workloads: Sequence[Workload],
    slot_bytes: Callable[[Unit], int],
    activations: ActivationSizes | None,
    candidates: frozenset[BlockKey] | None,
    experts: tuple[ExpertsUnit, ...],
) -> "FittedPlan | list[BudgetTooSmall]":
    """The first of the workloads that fits, with as few blocks taken apart as possible; else what was refused."""
    by_submodule: frozenset[BlockKey] = frozenset()
    refusals: list[BudgetTooSmall] = []
    while True:
        structure = find_structure(model, by_submodule, [value for unit in experts for value in unit.parameters.values()])
        spec = model_spec(model, structure, slot_bytes, activations, experts)
        # The parts of layers are no layers: a batch cannot be taken apart around them.
        for workload in (item for item in workloads if not (by_submodule and item.micro_batch)):
            try:
                plan = make_plan(spec, budgets.device_bytes, workload, budgets.host_bytes, candidates)
            except BudgetTooSmall as error:
                refusals.append(error)
            else:
                return FittedPlan(structure, spec, plan, by_submodule, _said(structure, by_submodule), experts)
        largest = _largest_to_split(structure)
        if not largest:
            return refusals
        by_submodule |= largest


def _other_experts(model: nn.Module, fitted: FittedPlan, experts: ExpertGranularity) -> list[str]:
    """That experts are streamed with their layers, because they cannot be told apart."""
    names = undecorated_experts(model) if fitted.plan.weights.streamed and experts is not ExpertGranularity.PER_LAYER else []
    if not names:
        return []
    return [f"{' and '.join(names)} hold experts otherwise than transformers' interface for them: whole layers are streamed"]


def _largest_to_split(structure: Structure) -> frozenset[BlockKey]:
    sizes = {unit.key: unit.block.nbytes for unit in structure.units if has_submodules(unit)}
    largest = max(sizes.values(), default=0)
    return frozenset(key for key, size in sizes.items() if size == largest)


def _said(structure: Structure, by_submodule: frozenset[BlockKey]) -> tuple[str, ...]:
    sentences = []
    if structure.by_leaf:
        sentences.append("the model has no list of repeated blocks: it is streamed by single modules, a transfer each")
    if by_submodule:
        largest = max(unit.block.nbytes for unit in structure.units)
        sentences.append(
            f"{len(by_submodule)} blocks are larger than the budget has room for and are streamed by their "
            f"sub-modules, of which the largest has {gib(largest)}"
        )
    return tuple(sentences)


def load_plan(path: str | Path) -> Plan:
    """Raises PlanError, which names the file."""
    try:
        return Plan.from_json(Path(path).read_text())
    except OSError as error:
        raise PlanError(f"the plan {path} cannot be read: {error.strerror}") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def given_plan(plan: Plan, spec: ModelSpec, workload: Workload, budgets: Budgets, exactness: str) -> Plan:
    """A plan that somebody gave, edited perhaps: checked, and its sums made anew.

    Raises:
        PlanError: if it is for another model, or rounds otherwise than the plain model where that was not asked for.
        BudgetTooSmall: if it takes more than the budget.
    """
    plan.check(spec)
    plan = plan.completed(spec, workload)
    if plan.rounds and exactness != ROUNDING:
        raise PlanError(
            f"by the plan {' and '.join(plan.rounds)}, whose results are rounded otherwise than the plain model's; "
            "give exactness='rounding' (--exactness rounding) to allow that"
        )
    if (plan.weights.computed_on_host or plan.weights.in_host_memory) and budgets.host_bytes is None:
        raise PlanError("the plan places layers in CPU memory beside a device, and the device that computes is the CPU")
    if plan.device_bytes > budgets.device_bytes:
        raise BudgetTooSmall(
            f"the plan takes {gib(plan.device_bytes)} of the device, and the budget is {gib(budgets.device_bytes)}; "
            "give a larger budget, or make less of it resident",
            plan.device_bytes,
        )
    return plan
