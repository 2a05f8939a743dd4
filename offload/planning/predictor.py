"""What the machine's profile says of a session: before it runs, and beside what was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from offload.budgets import Budgets
from offload.config import ROUNDING
from offload.model.blocks import TakenApart
from offload.model.encoding import KINDS
from offload.model.experts import find_experts
from offload.planning.dry_run import DryRun
from offload.planning.encoded_spec import encoded_layers
from offload.planning.estimate import estimated_pass
from offload.planning.operations import DryRunFailed
from offload.planning.pass_splits import ways_to_split
from offload.scheduler.cost import CostModel
from offload.scheduler.hardware import HardwareProfile, LinkRate
from offload.scheduler.kv_pages import PagedKv
from offload.scheduler.model_spec import ModelSpec, Workload
from offload.scheduler.phases import DECODE, PREFILL, PhaseTimes
from offload.scheduler.plan import Plan
from offload.scheduler.prediction import Prediction, WhatIf, predict
from offload.scheduler.work import PassWork
from offload.storage.errors import BudgetTooSmall, gib

if TYPE_CHECKING:
    from offload.scheduler.plan_search import SearchProblem

Shape = tuple[int, int, int, int]
"""Batch size, prompt tokens, context tokens, tokens of the prompt in one pass."""


_HIT_RATES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)

_MORE_MEMORY = (4 << 30, 16 << 30)


@dataclass(frozen=True, slots=True)
class PlanGoal:
    """What is asked of a plan.

    Attributes:
        workload: what memory is reserved for.
        prompt_tokens, new_tokens: of each sequence.
        exactness: `identical` or `rounding`.
    """

    workload: Workload
    prompt_tokens: int
    new_tokens: int
    budgets: Budgets
    exactness: str


def _twice(rate: LinkRate) -> LinkRate:
    return replace(rate, bytes_per_second=2 * rate.bytes_per_second)


def drifted_hardware(hardware: HardwareProfile, given: Mapping[str, float]) -> tuple[HardwareProfile, dict[str, float]]:
    """The machine with the speeds that its links gave, and by how much they differ from the profile's.

    Args:
        given: bytes a second by link: `disk`, `h2d`.
    """
    rates: dict[str, Any] = {"disk_read": hardware.disk_read, "h2d": hardware.h2d}
    drift = {}
    for link, field in (("disk", "disk_read"), ("h2d", "h2d")):
        rate = rates[field]
        if rate is not None and link in given:
            drift[link] = given[link] / rate.bytes_per_second - 1
            rates[field] = replace(rate, bytes_per_second=given[link])
    return replace(hardware, **rates), drift


class Predictor:
    """Predicts passes of one model on one machine.

    Args:
        model: looked at before it is offloaded; not kept.
        split: keys of the blocks that are taken apart.
        dtype: of the weights, by torch's name.
        outline: the model without values, if there is one: it is copied otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        by_submodule: TakenApart,
        hardware: HardwareProfile,
        dtype: str,
        outline: nn.Module | None = None,
    ) -> None:
        self.hardware = hardware
        self.cost = CostModel(hardware, dtype)
        self._dtype = dtype
        self.failure: str | None = None
        """Why the model's work is estimated from sizes; None if it was counted."""
        self._dry_run: DryRun | None = None
        try:
            self._dry_run = DryRun(model, by_submodule, outline=outline).keep_twin()
        except DryRunFailed as error:
            self.failure = str(error)
        self._known: dict[Shape, tuple[tuple[PassWork, ...], PassWork]] = {}
        self._parts: dict[Workload, list[Workload]] = {}
        self._whole = not by_submodule
        # Experts that are merged on loading are not encoded.
        self._encodable = not find_experts(model)

    def work(
        self, spec: ModelSpec, batch_size: int, prompt_tokens: int, context_tokens: int, chunk: int = 0
    ) -> tuple[tuple[PassWork, ...], PassWork]:
        """The passes of a prefill and a decode step: counted where the model's code runs without values, else estimated.

        Args:
            chunk: tokens of the prompt in one pass; 0 for all.
        """
        shape = batch_size, prompt_tokens, context_tokens, min(chunk or prompt_tokens, prompt_tokens)
        if shape not in self._known:
            self._known[shape] = self._work(spec, *shape)
        return self._known[shape]

    def best(
        self, spec: ModelSpec, order: PlanGoal, hardware: HardwareProfile | None = None, paged: Sequence[PagedKv] = ()
    ) -> tuple[Plan, Prediction]:
        """The fastest plan for an order, and what it will give.

        Args:
            hardware: another machine than the forecast's.
            paged: other ways to keep keys and values in pages than the order's.

        Raises:
            BudgetTooSmall: if none fits.
        """
        from offload.scheduler.plan_search import choose_plan

        cost = self.cost if hardware is None else CostModel(hardware, self._dtype)
        rounding = order.exactness == ROUNDING
        kept = [order.workload, *(replace(order.workload, paged=way) for way in paged)]
        workloads = [*kept, *(self._ways(order.workload) if rounding else ())]
        tasks = [self._task(spec, replace(order, workload=workload), cost) for workload in workloads]
        choice = choose_plan(tasks, allow_cpu=rounding)
        return choice.plan, choice.prediction

    def predict_by_hit_rate(self, plan: Plan, spec: ModelSpec, order: PlanGoal) -> dict[float, float]:
        """Seconds of a token, by the share of its experts that are in device memory; empty where none are brought singly."""
        if spec.experts is None:
            return {}
        task = self._task(spec, order, self.cost)
        expected = round(spec.experts.hit_rate(plan.experts.slots), 2)
        return {
            rate: predict(plan, spec, self.cost, task.prefill, task.decode, rate).seconds_per_token
            for rate in sorted({*_HIT_RATES, expected})
        }

    def _task(self, spec: ModelSpec, order: PlanGoal, cost: CostModel) -> "SearchProblem":
        from offload.scheduler.plan_search import SearchProblem

        context = order.prompt_tokens + order.new_tokens // 2
        chunk = order.workload.prefill_chunk
        prefill, decode = self.work(spec, order.workload.batch_size, order.prompt_tokens, context, chunk)
        budgets = order.budgets
        return SearchProblem(
            spec, order.workload, prefill, decode, order.new_tokens, cost, budgets.device_bytes, budgets.host_bytes
        )

    def _ways(self, workload: Workload) -> list[Workload]:
        """Into what it can be taken apart. The parts of layers are no layers, and a batch is not taken apart around them."""
        if self._dry_run is None:
            return []
        if workload not in self._parts:
            self._parts[workload] = ways_to_split(self._dry_run.model, workload)
        whole = self._whole and workload.paged is None
        return [way for way in self._parts[workload] if whole or not way.micro_batch]

    def what_if(self, spec: ModelSpec, order: PlanGoal, now: Prediction, further: bool = False) -> list[WhatIf]:
        """What changes would give: a plan is made for each (shadow prices, by trying). The largest help first.

        Args:
            now: without any change.
            further: try what takes longer, too: encoded weights, and a larger batch, whose work must be counted again.
        """
        budgets, hardware, found = order.budgets, self.hardware, []
        base = now.total_seconds(order.new_tokens) / order.workload.batch_size

        def attempt(change: str, order: PlanGoal, hardware: HardwareProfile | None = None, spec: ModelSpec = spec) -> None:
            try:
                _, prediction = self.best(spec, order, hardware)
            except BudgetTooSmall:
                return
            found.append(WhatIf(change, base * order.workload.batch_size / prediction.total_seconds(order.new_tokens)))

        alone = budgets.host_bytes is None
        for more in _more_memory(spec):
            larger = replace(budgets, device_bytes=budgets.device_bytes + more)
            attempt(f"+{gib(more)} of {'CPU' if alone else 'GPU'} memory", replace(order, budgets=larger))
            if budgets.host_bytes is not None:
                larger = replace(budgets, host_bytes=budgets.host_bytes + more)
                attempt(f"+{gib(more)} of CPU memory", replace(order, budgets=larger))
        attempt("a disk twice as fast", order, replace(hardware, disk_read=_twice(hardware.disk_read)))
        if hardware.h2d is not None:
            attempt("a bus twice as fast", order, replace(hardware, h2d=_twice(hardware.h2d)))
        if order.exactness != ROUNDING:
            what = "the batch or the prompt in parts" if alone else "layers on the CPU, the batch or the prompt in parts"
            attempt(f"exactness rounding ({what})", replace(order, exactness=ROUNDING))
        if further and self._encodable and not any(block.encoded_bytes for block in spec.blocks):
            for kind in KINDS:
                attempt(f"weights {kind} (lossy)", order, spec=encoded_layers(spec, kind, self._dtype))
        if further:
            larger_batch = replace(order.workload, batch_size=4 * order.workload.batch_size)
            attempt(f"batch size {larger_batch.batch_size}", replace(order, workload=larger_batch))
        return sorted(found, key=lambda item: -item.speedup)

    def predict_observed(
        self, plan: Plan, spec: ModelSpec, phases: Mapping[str, PhaseTimes], hardware: HardwareProfile | None = None
    ) -> Prediction | None:
        """Predict what was really asked: the first prefill, and decode steps after the mean context.

        Args:
            hardware: another machine than the forecast's.
        """
        prefill, decode = phases.get(PREFILL), phases.get(DECODE)
        if prefill is None or not prefill.passes:
            return None
        context = prefill.pass_tokens
        if decode is not None and decode.passes:
            context = max(1, decode.context_tokens // decode.passes)
        cost = self.cost if hardware is None else CostModel(hardware, self._dtype)
        work = self.work(spec, prefill.batch_size, prefill.pass_tokens, context, plan.splits.prefill_chunk)
        return predict(plan, spec, cost, *work)

    def _work(
        self, spec: ModelSpec, batch_size: int, prompt_tokens: int, context_tokens: int, chunk: int
    ) -> tuple[tuple[PassWork, ...], PassWork]:
        if self._dry_run is not None:
            try:
                prefill, decode = self._dry_run.passes(batch_size, prompt_tokens, context_tokens)
                return prefill.in_chunks(chunk), replace(decode, context_tokens=context_tokens)
            except DryRunFailed as error:
                self.failure = str(error)
        prefill = estimated_pass(spec, PREFILL, batch_size, prompt_tokens)
        decode = replace(estimated_pass(spec, DECODE, batch_size, 1), context_tokens=context_tokens)
        return prefill.in_chunks(chunk), decode


def _more_memory(spec: ModelSpec) -> tuple[int, ...]:
    """Steps that a budget may grow by; of a model that is smaller than the first, by what would hold all of it."""
    return _MORE_MEMORY if spec.resident_bytes > _MORE_MEMORY[0] else (spec.resident_bytes,)
