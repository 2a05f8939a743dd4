"""From a model and its budgets to a plan, taking blocks apart where they are too large."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

from torch import nn

from offload.budgets import Budgets
from offload.model.blocks import StoredSize, Structure, TakenApart, Unit, find_structure, has_submodules
from offload.model.experts import ExpertsUnit, find_experts, undecorated_experts
from offload.planning.describe import model_spec
from offload.planning.dry_run import DryRun
from offload.planning.operations import DryRunFailed
from offload.planning.pass_splits import ways_to_split
from offload.scheduler.kv_pages import KvDemand, PagedKv
from offload.scheduler.model_spec import ActivationSizes, ModelSpec, Workload
from offload.scheduler.plan import Plan
from offload.scheduler.planner import make_plan
from offload.storage.blocks import BlockKey
from offload.storage.errors import BudgetTooSmall, counted, gib
from offload.storage.load_plan import CARD_PIECE_BYTES, DECODE_WORKSPACE


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
    by_submodule: TakenApart
    fallbacks: tuple[str, ...]
    experts: tuple[ExpertsUnit, ...] = ()
    """Those that are brought one by one."""
    paged: tuple[PagedKv, ...] = ()
    """Other ways to keep keys and values in pages, of the same exactness, where they are."""


class FeatureMemory(Protocol):
    """What a feature holds in the budgets beside a model."""

    def left_of(self, budgets: Budgets) -> Budgets:
        """What is left for the model, which may be next to nothing."""
        ...

    def refused(self, error: BudgetTooSmall, budgets: Budgets) -> BudgetTooSmall:
        """The refusal of what was left, as one of the whole budget."""
        ...


@dataclass(frozen=True, slots=True)
class Demand:
    """What features ask of a plan, beside the model and the workload.

    Attributes:
        experts: whether they are cached one by one.
        kv: the ways to keep keys and values.
        allow_splits: passes may be split.
        candidates: the blocks that may stay on the device; None for all.
        held: parameters that always stay on the device.
        memory: what a feature holds beside a model that is taken apart so; None for nothing.
    """

    experts: ExpertGranularity = ExpertGranularity.PER_LAYER
    kv: KvDemand = field(default_factory=KvDemand)
    allow_splits: bool = True
    candidates: frozenset[BlockKey] | None = None
    held: tuple[nn.Parameter, ...] = ()
    memory: Callable[[Structure], FeatureMemory] | None = None


def fit(
    model: nn.Module,
    budgets: Budgets,
    workload: Workload,
    size_of: Callable[[Unit], StoredSize],
    activations: ActivationSizes | None,
    demand: Demand,
) -> FittedPlan:
    """Plan; where the budget is too small for the largest blocks, stream those by their sub-modules and plan again.

    Where nothing fits even so, the passes are split, which is of level *rounding*, and said.

    Args:
        size_of: what a unit's block takes, in files and in the slots.
        activations: of a pass, as counted; None to estimate them.

    Raises:
        BudgetTooSmall: if it is too small for the largest module that has no sub-modules to stream.
    """
    experts, paged = demand.experts, list(demand.kv.ways)
    if demand.kv.required:
        workload, paged = replace(workload, paged=paged[0]), paged[1:]
    units = tuple(find_experts(model)) if experts is not ExpertGranularity.PER_LAYER else ()
    whole: FittedPlan | list[BudgetTooSmall] = []
    if units and experts is ExpertGranularity.AUTO:
        whole = _fitting(model, budgets, [workload], size_of, activations, demand, ())
        if isinstance(whole, FittedPlan) and not whole.plan.weights.streamed:
            return whole
    found = _fitting(model, budgets, [workload], size_of, activations, demand, units)
    if isinstance(found, FittedPlan):
        notes = (*found.fallbacks, *_other_experts(model, found, experts))
        return replace(found, fallbacks=notes, paged=_smaller(paged, found.plan) if demand.kv.required else ())
    if isinstance(whole, FittedPlan):
        # Of a model so small that single experts, read in whole units, take more than a layer.
        said = "the budget is too small for per-expert caching; whole layers are streamed"
        return replace(whole, fallbacks=(*whole.fallbacks, said))
    # The KV cache goes to lower tiers before passes are taken apart: in one piece, that is exact.
    below = [replace(workload, paged=way) for way in paged]
    exact = [way for way in below if way.paged is not None and not way.paged.segments]
    rest = [way for way in below if way not in exact]
    steps: list[Callable[[], list[Workload]]] = [lambda: exact, lambda: rest]
    if demand.allow_splits:
        steps[1:1] = [lambda: ways_to_split(model, workload)]
        steps += [lambda: _chunked(model, exact[-1:]), lambda: _chunked(model, rest[-1:])]
    # The state of other layers, which is written anew in each pass, comes last.
    steps += [lambda: _with_state_offload(exact[-1:]), lambda: _with_state_offload(rest[-1:])]
    for step in steps:
        ways = step()
        split = _fitting(model, budgets, ways, size_of, activations, demand, units) if ways else []
        if isinstance(split, FittedPlan):
            notes = (*_forced(split.plan), *_other_experts(model, split, experts))
            others = [way.paged for way in ways if way.paged is not None]
            return replace(split, fallbacks=(*split.fallbacks, *notes), paged=_smaller(others, split.plan))
        found += split
    # Taken apart further, a model may need more: what lies beside the parts stays on the device. Of a way whose part of the
    # device fits, what is refused is its part of CPU memory.
    raise min(found, key=lambda refusal: (not refusal.of_host, refusal.least_bytes))


def _smaller(ways: Sequence[PagedKv], plan: Plan) -> tuple[PagedKv, ...]:
    """Those that are read as in the plan, and leave more memory to weights."""
    return tuple(way for way in ways if way.segments == plan.kv.segments and way.memory_bytes < plan.kv.memory_bytes)


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


def _fitting(
    model: nn.Module,
    budgets: Budgets,
    workloads: Sequence[Workload],
    size_of: Callable[[Unit], StoredSize],
    activations: ActivationSizes | None,
    demand: Demand,
    experts: tuple[ExpertsUnit, ...],
) -> "FittedPlan | list[BudgetTooSmall]":
    """The first of the workloads that fits, with as few blocks taken apart as possible; else what was refused."""
    keys: frozenset[BlockKey] = frozenset()
    refusals: list[BudgetTooSmall] = []
    single = [value for unit in experts for value in unit.parameters.values()]
    while True:
        by_submodule, strays = _in_one_piece(model, keys, single)
        structure = find_structure(model, by_submodule, single, [*demand.held, *strays])
        described = model_spec(model, structure, size_of, activations, experts)
        decoding = 0 if budgets.host_bytes is None else decode_workspace_bytes(described)
        spec = replace(described, workspace_bytes=budgets.workspace_bytes + decoding)
        memory = None if demand.memory is None else demand.memory(structure)
        left = budgets if memory is None else memory.left_of(budgets)
        # The parts of layers are no layers: a batch cannot be taken apart around them.
        for workload in (item for item in workloads if not (by_submodule and item.micro_batch)):
            try:
                plan = make_plan(spec, left.device_bytes, workload, left.host_bytes, demand.candidates)
            except BudgetTooSmall as error:
                refusals.append(error if memory is None else memory.refused(error, budgets))
            else:
                return FittedPlan(structure, spec, plan, by_submodule, _said(structure, by_submodule), experts)
        largest = _largest_to_split(structure, by_submodule.whole)
        if not largest:
            return refusals
        keys |= largest


def decode_workspace_bytes(spec: ModelSpec) -> int:
    """What decoding takes of a card's memory beside the slots: some times the bytes of a piece."""
    largest = max((block.resident_bytes for block in spec.blocks if block.encoded_bytes), default=0)
    return DECODE_WORKSPACE * min(CARD_PIECE_BYTES, largest)


def _in_one_piece(
    model: nn.Module, keys: frozenset[BlockKey], single: Sequence[nn.Parameter]
) -> tuple[TakenApart, list[nn.Parameter]]:
    """Keep together what reads weights of its parts without calling them, as the model's own code shows.

    Args:
        keys: of the units to take apart.
        single: parameters of experts, which the runtime hands out one by one.

    Returns:
        What is taken apart, and parameters that code reads which no unit is called for: they stay on the device.
    """
    known, excluded, whole = dict(model.named_parameters()), {id(value) for value in single}, frozenset[str]()
    while True:
        by_submodule = TakenApart(keys, whole)
        try:
            names = DryRun(model, by_submodule).stray_reads()
        except DryRunFailed:
            return by_submodule, []
        strays = {name for name in names if name in known and id(known[name]) not in excluded}
        inside = {name for name in strays if any(name.startswith(f"{key}.") for key in keys)}
        # The module around the one whose weight it is; what is taken apart already is in one piece again.
        around = {name.rpartition(".")[0].rpartition(".")[0] for name in inside}
        if around <= whole:
            return by_submodule, [known[name] for name in strays]
        keys, whole = keys - around, whole | around


def _other_experts(model: nn.Module, fitted: FittedPlan, experts: ExpertGranularity) -> list[str]:
    """Explain that experts are streamed with their layers, because they cannot be told apart."""
    names = undecorated_experts(model) if fitted.plan.weights.streamed and experts is not ExpertGranularity.PER_LAYER else []
    if not names:
        return []
    return [f"{' and '.join(names)} hold experts otherwise than transformers' interface for them: whole layers are streamed"]


def _largest_to_split(structure: Structure, whole: frozenset[str]) -> frozenset[BlockKey]:
    sizes = {unit.key: unit.block.nbytes for unit in structure.units if has_submodules(unit) and unit.key not in whole}
    largest = max(sizes.values(), default=0)
    return frozenset(key for key, size in sizes.items() if size == largest)


def _said(structure: Structure, by_submodule: TakenApart) -> tuple[str, ...]:
    sentences = []
    if structure.by_leaf:
        sentences.append("the model has no list of repeated blocks: it is streamed by single modules, a transfer each")
    if by_submodule:
        largest = max(unit.block.nbytes for unit in structure.units)
        sentences.append(
            f"{counted(len(by_submodule.keys), 'block is', 'blocks are')} larger than the budget has room for and "
            f"streamed by their sub-modules, of which the largest has {gib(largest)}"
        )
    return tuple(sentences)
