"""A plan without loading: from a model's config and headers, for this machine or for one that is described."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from offload.budgets import HOST_MARGIN_BYTES, Budgets, resolve_budgets
from offload.config import IDENTICAL, parse_bytes
from offload.kv.options import PLAIN, KvOptions
from offload.model.from_pretrained import LoadingOptions
from offload.model.loading import CheckpointLoader, find_outline
from offload.model.text_generation import check_writes_text
from offload.moe.options import ExpertOptions
from offload.planning.describe import count_activations
from offload.probe import hardware_profile
from offload.runtime.meters import predicted_peak_bytes
from offload.scheduler.hardware import HardwareProfile
from offload.scheduler.host_memory import weights_in_host_memory
from offload.scheduler.model_spec import ModelSpec, Workload
from offload.scheduler.plan import Plan
from offload.scheduler.prediction import Prediction, WhatIf
from offload.session.prepare import PlanInput, prepare
from offload.session.training_preview import Adapters, TrainingPlan, planned_step
from offload.storage.devices.resolve import resolve_device
from offload.storage.errors import BudgetTooSmall, ConfigError, gib
from offload.training.options import Training


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a plan is for.

    Attributes:
        gpu_memory, cpu_memory: budgets, as a user writes them; None for what there is.
        exactness: `identical` or `rounding`.
        experts: how experts are cached.
        kv: how keys and values are kept.
    """

    prompt_tokens: int = 512
    new_tokens: int = 128
    batch_size: int = 1
    gpu_memory: str | int | None = None
    cpu_memory: str | int | None = None
    exactness: str = "identical"
    experts: ExpertOptions = field(default_factory=ExpertOptions)
    kv: KvOptions = PLAIN

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, slots=True)
class PlanResult:
    """A plan and what it will give.

    Attributes:
        weight_bytes: of the model.
        peak_bytes: by tier, all included.
        by_hit_rate: seconds of a token, by the share of its experts that are in device memory; empty where no experts are
            brought one by one.
        expected_hit_rate: the one that `prediction` is for.
        what_if: the changes that would help, and those that would not; the largest help first.
        notes: a sentence for everything that is not as one would expect.
    """

    model: str
    hardware: str
    weight_bytes: int
    plan: Plan
    prediction: Prediction
    peak_bytes: dict[str, int]
    budget_bytes: dict[str, int]
    by_hit_rate: dict[float, float]
    expected_hit_rate: float | None
    what_if: tuple[WhatIf, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Planner:
    """Plans for one model.

    Args:
        name: a checkpoint folder, `demo`, or a hub id, of which only the config is fetched.
        hardware: the machine; None for this one.
        device: what computes, on this machine.
        disk_dir: a folder on the disk that weights are read from.
        progress: told (what, done, total) while the machine is measured.
        loading: what `offload` takes of `from_pretrained`, and `weights`.
    """

    def __init__(
        self,
        name: str,
        hardware: HardwareProfile | None = None,
        device: str = "auto",
        disk_dir: str | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        **loading: Any,
    ) -> None:
        self._name = name
        self._loader: CheckpointLoader = find_outline(name, LoadingOptions.of(loading))
        outline = self._loader.outline()
        if outline is None:
            raise ConfigError(f"{name} is quantised: its plan is known once it is loaded; run `offload generate`")
        check_writes_text(outline, name)
        self._model: nn.Module = outline
        self._device = None if hardware is not None else resolve_device(device)
        if self._device is not None:
            hardware = hardware_profile(self._device, disk_dir, progress=progress)
        assert hardware is not None
        self.hardware = hardware

    def plan(self, asked: PlanRequest) -> PlanResult:
        """The fastest plan.

        Raises:
            BudgetTooSmall: if none fits; its `least_bytes` would do.
        """
        budgets = self._budgets(asked)
        workload = Workload(asked.batch_size, asked.prompt_tokens + asked.new_tokens, asked.prompt_tokens)
        given = PlanInput(budgets, workload, asked.new_tokens, asked.exactness, asked.experts, asked.kv, hardware=self.hardware)
        activations = count_activations(self._model, workload)
        prepared = prepare(self._model, given, self._loader.size_of, activations, always_search=True)
        fitted, plan, predictor, prediction = prepared.fitted, prepared.plan, prepared.predictor, prepared.prediction
        assert predictor is not None
        assert prediction is not None
        notes = [*prepared.notes]
        if predictor.failure is not None:
            notes.append(f"the model's code does not run without values: its work is estimated ({predictor.failure})")
        if plan.rounds:
            notes.append(f"{', '.join(plan.rounds)}: exactness is rounding")
        if budgets.host_bytes is None:
            besides = predicted_peak_bytes(plan, shares_host_memory=True) - plan.device_bytes
            notes.append(f"beside its budget the process will hold about {gib(besides)} more than it does before")
        tiers = ("cpu",) if budgets.host_bytes is None else ("gpu", "cpu")
        return PlanResult(
            model=self._name,
            hardware=self.hardware.description,
            weight_bytes=sum(value.nbytes for value in self._model.parameters()),
            plan=plan,
            prediction=prediction,
            peak_bytes=dict(zip(tiers, (plan.device_bytes, _host_bytes(plan, fitted.spec)), strict=False)),
            budget_bytes=dict(zip(tiers, (budgets.device_bytes, budgets.host_bytes or 0), strict=False)),
            by_hit_rate=predictor.predict_by_hit_rate(plan, fitted.spec, prepared.goal),
            expected_hit_rate=None if fitted.spec.experts is None else fitted.spec.experts.hit_rate(plan.experts.slots),
            what_if=tuple(predictor.what_if(fitted.spec, prepared.goal, prediction, further=True)),
            notes=tuple(notes),
        )

    def plan_training(
        self, asked: PlanRequest, training: Training | None = None, rank: int = 16, micro_batches: int = 1
    ) -> TrainingPlan:
        """Plan fine-tuning, and estimate a step of sequences of `prompt_tokens`.

        Args:
            training: how; adapters are trained, unless all weights are.
            rank: of the adapters, on every linear layer.
            micro_batches: whose gradients a step adds up.

        Raises:
            BudgetTooSmall: if none fits; its `least_bytes` would do, beside the adapters.
        """
        training = replace(training or Training(), micro_batches=micro_batches)
        budgets, workload = self._budgets(asked), Workload(asked.batch_size, asked.prompt_tokens, asked.prompt_tokens)
        adapters = Adapters((), training) if training.full else Adapters.of(self._model, rank, training)
        left = adapters.left_of(budgets)
        given = PlanInput(left, workload, 1, IDENTICAL, asked.experts, PLAIN, training, hardware=self.hardware)
        activations = count_activations(self._model, workload)
        try:
            prepared = prepare(self._model, given, self._loader.size_of, activations)
        except BudgetTooSmall as error:
            raise adapters.refused(error, budgets) from error
        assert prepared.memory is not None
        plan, memory, (on_device, on_host) = prepared.plan, prepared.memory, adapters.held(budgets)
        host = on_host + memory.beside_device_bytes(budgets) + _host_bytes(plan, prepared.fitted.spec)
        tiers = ("cpu",) if budgets.host_bytes is None else ("gpu", "cpu")
        return TrainingPlan(
            model=self._name,
            hardware=self.hardware.description,
            weight_bytes=sum(value.nbytes for value in self._model.parameters()),
            plan=plan,
            estimate=planned_step(self._model, prepared, adapters, micro_batches),
            peak_bytes=dict(zip(tiers, (plan.device_bytes + memory.device_bytes(budgets) + on_device, host), strict=False)),
            budget_bytes=dict(zip(tiers, (budgets.device_bytes, budgets.host_bytes or 0), strict=False)),
            notes=prepared.notes,
        )

    def _budgets(self, asked: PlanRequest) -> Budgets:
        if self._device is not None:
            return resolve_budgets(self._device, asked.gpu_memory, asked.cpu_memory, 0)
        gpu, cpu = parse_bytes(asked.gpu_memory, "gpu_memory"), parse_bytes(asked.cpu_memory, "cpu_memory")
        host = cpu or self.hardware.host.memory_bytes - HOST_MARGIN_BYTES
        if self.hardware.device is None:
            if gpu is not None:
                raise ConfigError("gpu_memory was given, and the described machine has no GPU: give cpu_memory only")
            return Budgets(host, None)
        card = self.hardware.device
        return Budgets(gpu or card.memory_bytes * 9 // 10, host, card.workspace_bytes)


def _host_bytes(plan: Plan, spec: ModelSpec) -> int:
    """CPU memory beside a device: weights that live there, and staging."""
    experts = (plan.experts.in_host_memory + plan.experts.staging_count) * plan.experts.slot_bytes
    return weights_in_host_memory(plan, spec) + experts + plan.kv.host_bytes
