"""What the CPU computes beside a device of its own memory, and what a pass is taken apart into, by the cost model.

A layer that the CPU computes never crosses the link; it costs the CPU's time instead, and CPU memory. An integer program
finds how many of each kind of layer should live where, and the simulator chooses among the plans around its answer.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy
from scipy.optimize import Bounds, LinearConstraint, milp

from offload.scheduler.cost import CostModel
from offload.scheduler.host_memory import spread
from offload.scheduler.model_spec import ModelSpec, PlacedBlock, Workload
from offload.scheduler.plan import DEVICE_ALONE, HostCompute, Plan
from offload.scheduler.planner import make_plan
from offload.scheduler.prediction import Prediction, predict
from offload.scheduler.work import ModuleWork, PassWork, Work
from offload.storage.errors import BudgetTooSmall

_NEIGHBOURS = (-2, -1, 1, 2)
"""The program knows sums, not the order of things: plans with some layers more or fewer are tried too."""

_PARTS = 8
"""And so are every eighth of the layers: a plan costs milliseconds to try."""

_PERCENTS = range(10, 100, 10)
"""Percentages of a layer's rows for the CPU that are tried, where it and the device share one."""

_GAP = 0.01


class LayerPlacement(Enum):
    """Where a layer lives and what computes it."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    CPU = "cpu"


@dataclass(frozen=True, slots=True)
class SearchProblem:
    """What is asked, and of which machine.

    Attributes:
        prefill: the work of a prompt, a pass a chunk.
        decode: of one token's pass.
        new_tokens: of each sequence.
        device_bytes, host_bytes: the budgets.
    """

    model: ModelSpec
    workload: Workload
    prefill: tuple[PassWork, ...]
    decode: PassWork
    new_tokens: int
    cost: CostModel
    device_bytes: int
    host_bytes: int | None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan, and what it will give."""

    plan: Plan
    prediction: Prediction

    def seconds(self, task: SearchProblem) -> float:
        return self.prediction.total_seconds(task.new_tokens)


def choose_plan(tasks: Sequence[SearchProblem], allow_cpu: bool) -> Candidate:
    """The plan with the least time for a prompt and its answer.

    Args:
        tasks: ways to take the same work apart, the whole one first: the others are weighed by the rule's plan for each.
        allow_cpu: the CPU may compute layers or parts of them, which is of level *rounding*.

    Raises:
        BudgetTooSmall: if no plan fits.
    """
    begun = {}
    refusals = []
    for index, task in enumerate(tasks):
        try:
            begun[index] = evaluate(task)
        except BudgetTooSmall as error:
            refusals.append(error)
    if not begun:
        raise min(refusals, key=lambda error: error.least_bytes)
    fastest = min(begun, key=lambda index: begun[index].seconds(tasks[index]))
    found = {index: _improved(tasks[index], begun[index], allow_cpu) for index in {min(begun), fastest}}
    best = min(found, key=lambda index: found[index].seconds(tasks[index]))
    return found[best]


def _improved(task: SearchProblem, rule: Candidate, allow_cpu: bool) -> Candidate:
    """The fastest of the rule's plan and those that compute on the CPU, or prefetch deeper."""
    if not rule.plan.weights.streamed:
        return rule
    if task.host_bytes is None:
        return min([rule, *_with_encoded(task)], key=lambda choice: choice.seconds(task))
    choices = [rule]
    # A layer that the CPU computes would want its keys and values there.
    layers = _layers_apart(task.model) if allow_cpu and task.workload.paged is None else []
    for host_compute in (*_candidates(task, layers), *_divided(rule.plan, layers)) if layers else ():
        try:
            choices.append(evaluate(task, host_compute))
        except BudgetTooSmall:
            continue
    best = min(choices, key=lambda choice: choice.seconds(task))
    return min([best, *_with_more_slots(task, best.plan)], key=lambda choice: choice.seconds(task))


def _with_encoded(task: SearchProblem) -> Iterator[Candidate]:
    """Some layers kept in their stored form: more fit than do as plain tensors, and the disk is not asked for them."""
    layers = spread([block for block in task.model.layers if block.encoded_bytes])
    for count in sorted({len(layers) * part // _PARTS for part in range(1, _PARTS + 1)} - {0}):
        encoded = frozenset(block.key for block in layers[:count])
        try:
            yield _predicted(task, make_plan(task.model, task.device_bytes, task.workload, encoded=encoded))
        except BudgetTooSmall:
            return


def evaluate(task: SearchProblem, host_compute: HostCompute = DEVICE_ALONE) -> Candidate:
    """The plan that computes this on the CPU, and what it will give.

    Raises:
        BudgetTooSmall: if it does not fit.
    """
    held = sum(block.slot_bytes for block in task.model.blocks if block.key in host_compute.whole | host_compute.shared)
    if held > (task.host_bytes or 0):
        raise BudgetTooSmall("the layers that the CPU computes take more than the budget of CPU memory", held)
    return _predicted(task, make_plan(task.model, task.device_bytes, task.workload, task.host_bytes, host_compute=host_compute))


def _predicted(task: SearchProblem, plan: Plan) -> Candidate:
    return Candidate(plan, predict(plan, task.model, task.cost, task.prefill, task.decode))


def _with_more_slots(task: SearchProblem, plan: Plan) -> Iterator[Candidate]:
    """Some layers given up for a deeper prefetch, which helps where a pass computes for long and then waits for long."""
    layers = [block for block in task.model.layers if block.key in plan.weights.resident]
    for given_up in {0, 1, 2, len(layers) // 2, len(layers)}:
        kept = frozenset(plan.weights.resident) - {block.key for block in spread(layers)[:given_up]}
        try:
            deeper = make_plan(task.model, task.device_bytes, task.workload, task.host_bytes, kept, plan.host_compute)
        except BudgetTooSmall:
            continue
        room = (task.device_bytes - deeper.device_bytes) // deeper.weights.slot_bytes if deeper.weights.slot_bytes else 0
        useful = min(room, len(deeper.weights.streamed) - deeper.weights.slot_count)
        if useful > 0:
            yield _predicted(
                task, replace(deeper, weights=replace(deeper.weights, slot_count=deeper.weights.slot_count + useful))
            )


def _divided(rule: Plan, layers: Sequence[PlacedBlock]) -> Iterator[HostCompute]:
    """Every layer that is streamed from CPU memory, in several proportions."""
    names = {block.key for block in layers if block.divisible}
    streamed = frozenset(key for key in rule.weights.in_host_memory if key in names)
    for percent in _PERCENTS if streamed else ():
        yield HostCompute(shared=streamed, percent=percent)


def _candidates(task: SearchProblem, layers: Sequence[PlacedBlock]) -> Iterator[HostCompute]:
    """Some layers on the CPU as a whole."""
    counts = solve(task, layers)
    groups = group_identical(layers, task.decode)
    best = sum(counts[index][LayerPlacement.CPU] for index in range(len(groups)))
    tried: set[int] = {0}
    parts = (len(layers) * part // _PARTS for part in range(1, _PARTS + 1))
    for wanted in (best, *(best + step for step in _NEIGHBOURS), *parts):
        if 0 < wanted <= len(layers) and wanted not in tried:
            tried.add(wanted)
            yield HostCompute(whole=frozenset(block.key for block in _share_out(groups, counts, wanted)))


def _share_out(
    groups: Sequence[Sequence[PlacedBlock]], counts: Sequence[Mapping[LayerPlacement, int]], wanted: int
) -> list[PlacedBlock]:
    """`wanted` layers, as many of each kind as the program said as far as that goes, spread evenly among their like."""
    chosen: list[PlacedBlock] = []
    rest: list[PlacedBlock] = []
    for group, count in zip(groups, counts, strict=True):
        order = spread(group)
        chosen += order[: count[LayerPlacement.CPU]]
        rest += order[count[LayerPlacement.CPU] :]
    return (chosen + rest)[:wanted]


def solve(task: SearchProblem, layers: Sequence[PlacedBlock]) -> list[dict[LayerPlacement, int]]:
    """How many layers of each kind live where, by an integer program; kinds in the order of `_alike`.

    Minimises prefill + new tokens x decode, where a pass takes as long as the busiest of its resources (FlexGen, arXiv
    2303.06865, equation 1): the chain of compute, the link, the disk, and the CPU's memory, through which both go.
    """
    groups = group_identical(layers, task.decode)
    homes = list(LayerPlacement)
    size = len(groups) * len(homes)
    prefill_at, decode_at = size, size + 1
    objective = numpy.zeros(size + 2)
    objective[prefill_at], objective[decode_at] = len(task.prefill), max(0, task.new_tokens - 1)
    rows: list[tuple[numpy.ndarray, float, float]] = []
    for index, group in enumerate(groups):
        row = numpy.zeros(size + 2)
        row[index * len(homes) : (index + 1) * len(homes)] = 1
        rows.append((row, len(group), len(group)))
    for work, at in ((task.prefill[-1], prefill_at), (task.decode, decode_at)):
        rows += [(row, -numpy.inf, 0.0) for row in _times(task, groups, homes, work, at, size)]
    rows += _memory(task, groups, homes, size)
    matrix, lows, highs = (numpy.array(column) for column in zip(*rows, strict=True))
    solution = milp(
        objective,
        constraints=LinearConstraint(matrix, lows, highs),
        integrality=numpy.array([1] * size + [0, 0]),
        bounds=Bounds(0, numpy.inf),
        options={"mip_rel_gap": _GAP},
    )
    if solution.x is None:
        # No room by the program's reckoning: the rule's plan stands.
        return [dict.fromkeys(homes, 0) for _ in groups]
    found = [round(value) for value in solution.x[:size]]
    return [dict(zip(homes, found[start : start + len(homes)], strict=True)) for start in range(0, size, len(homes))]


def _times(
    task: SearchProblem,
    groups: Sequence[Sequence[PlacedBlock]],
    homes: Sequence[LayerPlacement],
    work: PassWork,
    at: int,
    size: int,
) -> Iterator[numpy.ndarray]:
    """The seconds that each resource takes, less the seconds of the pass."""
    hardware = task.cost.hardware
    assert hardware.h2d is not None
    assert hardware.d2h is not None
    modules = {module.key: module for module in work.modules}
    compute, link, disk, memory = (numpy.zeros(size + 2) for _ in range(4))
    for index, group in enumerate(groups):
        module = modules.get(group[0].key, ModuleWork(group[0].key, (), Work()))
        hops = hardware.h2d.seconds(module.result_bytes) + hardware.d2h.seconds(module.result_bytes)
        nbytes = group[0].stored_bytes
        for place, home in enumerate(homes):
            column = index * len(homes) + place
            on_cpu = home is LayerPlacement.CPU
            compute[column] = task.cost.module(module.work, on_cpu).compute_seconds + (hops if on_cpu else 0.0)
            crosses = home in (LayerPlacement.HOST, LayerPlacement.DISK)
            link[column] = nbytes / hardware.h2d.bytes_per_second if crosses else 0.0
            disk[column] = nbytes / hardware.disk_read.bytes_per_second if home is LayerPlacement.DISK else 0.0
            passes = {LayerPlacement.DEVICE: 0, LayerPlacement.HOST: 1, LayerPlacement.CPU: 1, LayerPlacement.DISK: 2}[home]
            memory[column] = passes * nbytes / hardware.host.memory_bytes_per_second
    for row in (compute, link, disk, memory):
        row[at] = -1.0
        yield row


def _memory(
    task: SearchProblem, groups: Sequence[Sequence[PlacedBlock]], homes: Sequence[LayerPlacement], size: int
) -> Iterator[tuple[numpy.ndarray, float, float]]:
    layers = [block for group in groups for block in group]
    slot_bytes = max(block.slot_bytes for block in layers)
    names = {block.key for block in layers}
    fixed = sum(block.resident_bytes for block in task.model.blocks if block.key not in names)
    reserved = (
        task.model.always_resident_bytes + task.workload.kv_bytes(task.model) + task.workload.activation_bytes(task.model)
    )
    device, host = numpy.zeros(size + 2), numpy.zeros(size + 2)
    for index, group in enumerate(groups):
        for place, home in enumerate(homes):
            column = index * len(homes) + place
            device[column] = group[0].resident_bytes if home is LayerPlacement.DEVICE else 0
            host[column] = {LayerPlacement.HOST: group[0].host_bytes, LayerPlacement.CPU: group[0].slot_bytes}.get(home, 0)
    yield device, -numpy.inf, max(0, task.device_bytes - reserved - fixed - 2 * slot_bytes)
    yield host, -numpy.inf, max(0, (task.host_bytes or 0) - 2 * slot_bytes)


def _layers_apart(model: ModelSpec) -> list[PlacedBlock]:
    """The layers that are needed together with no other block."""
    shared = {key for module in model.co_resident_blocks if len(module) > 1 for key in module}
    return [block for block in model.layers if block.key not in shared]


def group_identical(layers: Iterable[PlacedBlock], work: PassWork) -> list[list[PlacedBlock]]:
    """The layers in groups of equal size and equal work."""
    works = {module.key: module.work for module in work.modules}
    groups: dict[object, list[PlacedBlock]] = {}
    for block in layers:
        groups.setdefault((block.slot_bytes, block.stored_bytes, works.get(block.key)), []).append(block)
    return list(groups.values())
