"""What the machine's profile says of a session: before it runs, and beside what was measured."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from offload.model.dry_run import DryRun, DryRunFailed
from offload.model.estimate import estimated_pass
from offload.runtime.clock import DECODE, PREFILL, PhaseTimes
from scheduler.cost import CostModel
from scheduler.hardware import HardwareProfile
from scheduler.model_spec import ModelSpec, Workload
from scheduler.plan import Plan
from scheduler.prediction import Prediction, predict
from scheduler.work import PassWork
from storage.blocks import BlockKey

if TYPE_CHECKING:
    from scheduler.choice import Choice


class Forecast:
    """Predicts passes of one model on one machine.

    Args:
        model: looked at before it is offloaded; not kept.
        split: keys of the blocks that are taken apart.
        dtype: of the weights, by torch's name.
    """

    def __init__(self, model: nn.Module, split: frozenset[BlockKey], hardware: HardwareProfile, dtype: str) -> None:
        self.hardware = hardware
        self.cost = CostModel(hardware, dtype)
        self.failure: str | None = None
        """Why the model's work is estimated from sizes; None if it was counted."""
        self._dry_run: DryRun | None = None
        try:
            self._dry_run = DryRun(model, split)
        except DryRunFailed as error:
            self.failure = str(error)
        self._known: dict[tuple[int, int, int], tuple[PassWork, PassWork]] = {}

    def work(self, spec: ModelSpec, batch_size: int, prompt_tokens: int, context_tokens: int) -> tuple[PassWork, PassWork]:
        """A prefill and a decode step: counted where the model's code runs without values, else estimated."""
        shape = batch_size, prompt_tokens, context_tokens
        if shape not in self._known:
            self._known[shape] = self._work(spec, *shape)
        return self._known[shape]

    def predict(self, plan: Plan, spec: ModelSpec, batch_size: int, prompt_tokens: int, context_tokens: int) -> Prediction:
        prefill, decode = self.work(spec, batch_size, prompt_tokens, context_tokens)
        return predict(plan, spec, self.cost, prefill, decode)

    def choose(
        self, spec: ModelSpec, workload: Workload, device_bytes: int, host_bytes: int | None, new_tokens: int
    ) -> "Choice":
        """The fastest plan of level *rounding*."""
        from scheduler.choice import Task, choose_plan

        prompt = max(1, workload.total_tokens - new_tokens)
        prefill, decode = self.work(spec, workload.batch_size, prompt, workload.total_tokens)
        return choose_plan(Task(spec, workload, prefill, decode, new_tokens, self.cost, device_bytes, host_bytes), True)

    def afterwards(self, plan: Plan, spec: ModelSpec, phases: Mapping[str, PhaseTimes]) -> Prediction | None:
        """For what was really asked: the first prefill, and decode steps after the mean context."""
        prefill, decode = phases.get(PREFILL), phases.get(DECODE)
        if prefill is None or not prefill.passes:
            return None
        context = prefill.pass_tokens
        if decode is not None and decode.passes:
            context = max(1, decode.context_tokens // decode.passes)
        return self.predict(plan, spec, prefill.batch_size, prefill.pass_tokens, context)

    def _work(self, spec: ModelSpec, batch_size: int, prompt_tokens: int, context_tokens: int) -> tuple[PassWork, PassWork]:
        if self._dry_run is not None:
            try:
                return self._dry_run.passes(batch_size, prompt_tokens, context_tokens)
            except DryRunFailed as error:
                self.failure = str(error)
        return (
            estimated_pass(spec, PREFILL, batch_size, prompt_tokens),
            estimated_pass(spec, DECODE, batch_size, 1),
        )
