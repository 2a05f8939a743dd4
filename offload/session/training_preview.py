"""What a step of fine-tuning would take of a model that is not loaded."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from offload.budgets import Budgets
from offload.report.training import TrainingEstimate
from offload.scheduler.plan import Plan
from offload.scheduler.sub_groups import StateLayout, Trained
from offload.session.prepare import Prepared
from offload.storage.blocks import DTYPE_BYTES
from offload.storage.errors import BudgetTooSmall, gib
from offload.training.chosen import chosen_parameters
from offload.training.estimate import TrainedWork, estimated, step_seconds
from offload.training.memory import layout_of, trained_layout
from offload.training.optimizer.nvme_states import BUFFER_COUNT
from offload.training.options import Training


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """A plan for training, and what a step takes.

    Attributes:
        weight_bytes: of the model.
        budget_bytes, peak_bytes: by tier, all included.
        notes: a sentence for everything that is not as one would expect.
    """

    model: str
    hardware: str
    weight_bytes: int
    plan: Plan
    estimate: TrainingEstimate
    peak_bytes: dict[str, int]
    budget_bytes: dict[str, int]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Adapters:
    """What LoRA would add to every linear layer but the head; peft keeps it in fp32.

    Attributes:
        parts: the two matrices of each layer, as one.
    """

    parts: tuple[Trained, ...]
    training: Training

    @classmethod
    def of(cls, model: nn.Module, rank: int, training: Training) -> "Adapters":
        """Name those of a model without values."""
        head = getattr(model, "get_output_embeddings", lambda: None)()
        linear = [
            (name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
        ]
        parts = [Trained(name, rank * (module.in_features + module.out_features), "float32") for name, module in linear]
        return cls(tuple(parts), training)

    @property
    def nbytes(self) -> int:
        return sum(part.elements * DTYPE_BYTES[part.dtype] for part in self.parts)

    @property
    def layout(self) -> StateLayout:
        return layout_of([("adapters", list(self.parts))], self.training)

    @property
    def state_bytes(self) -> int:
        """In CPU memory."""
        on_nvme = self.training.state_tier != "cpu"
        return BUFFER_COUNT * self.layout.largest_bytes if on_nvme else self.layout.state_bytes

    def held(self, budgets: Budgets) -> tuple[int, int]:
        """Bytes of the device and of CPU memory beside it: weights and gradients, and states."""
        if not self.parts:
            return 0, 0
        on_device = 2 * self.nbytes
        return (on_device, self.state_bytes) if budgets.host_bytes is not None else (on_device + self.state_bytes, 0)

    def left_of(self, budgets: Budgets) -> Budgets:
        """What is left for the model, which may be next to nothing."""
        device, host = self.held(budgets)
        host_bytes = None if budgets.host_bytes is None else max(1, budgets.host_bytes - host)
        return replace(budgets, device_bytes=max(1, budgets.device_bytes - device), host_bytes=host_bytes)

    def refused(self, error: BudgetTooSmall, budgets: Budgets) -> BudgetTooSmall:
        """The refusal of what was left for the model, as one of the whole budget."""
        held = self.held(budgets)[error.of_host]
        if not held:
            return error
        least = error.least_bytes + held
        return BudgetTooSmall(
            f"adapters and what steps them take {gib(held)}; with them {gib(least)} ({least} bytes) would do: give a larger "
            f"budget, or a smaller rank. Of what is left for the model: {error}",
            least,
            error.of_host,
        )


def planned_step(model: nn.Module, prepared: Prepared, adapters: Adapters, micro_batches: int) -> TrainingEstimate:
    """Estimate a step: of adapters, or of all weights where there are none."""
    training, chosen = adapters.training, chosen_parameters(model, adapters.training)
    if adapters.parts:
        work = TrainedWork(adapters.layout, adapters.nbytes, training)
        held = adapters.nbytes, adapters.state_bytes
    else:
        layout = trained_layout(prepared.fitted.structure, training, {id(value) for value in chosen})
        work = TrainedWork(layout, _nbytes(chosen), training)
        memory = prepared.memory
        held = (0, 0) if memory is None else (memory.gradient_bytes, memory.state_bytes)
    seconds = None
    if prepared.predictor is not None:
        sizes = prepared.plan, prepared.fitted.spec, prepared.workload
        seconds = step_seconds(work, *sizes, prepared.predictor, micro_batches, layer_major=True)
    return estimated(work, model, prepared.workload, held, seconds, micro_batches)


def _nbytes(values: Sequence[nn.Parameter]) -> int:
    return sum(value.nbytes for value in values)
