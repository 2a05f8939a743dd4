"""What the machine's profile says of a session: before it runs, and beside what was measured."""

from collections.abc import Mapping

from torch import nn

from offload.model.dry_run import DryRun, DryRunFailed
from offload.model.estimate import estimated_pass
from offload.runtime.clock import DECODE, PREFILL, PhaseTimes
from scheduler.cost import CostModel
from scheduler.hardware import HardwareProfile
from scheduler.model_spec import ModelSpec
from scheduler.plan import Plan
from scheduler.prediction import Prediction, predict
from scheduler.work import PassWork
from storage.blocks import BlockKey


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
