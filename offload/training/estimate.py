"""What a training will take, told before its first step."""

from dataclasses import dataclass
from typing import Any

from offload.model.blocks import find_structure
from offload.planning.predictor import Predictor
from offload.report.training import TrainingEstimate
from offload.scheduler.model_spec import ModelSpec, Workload
from offload.scheduler.plan import Plan
from offload.scheduler.prediction import predict
from offload.scheduler.sub_groups import StateLayout
from offload.training.memory import inputs_bytes
from offload.training.optimizer.streamed_optimizer import StreamedTraining
from offload.training.options import NVME, Training

_UPDATE_BYTES = 28
"""Bytes of memory traffic for each element that AdamW steps: four tensors read, three written."""


@dataclass(frozen=True, slots=True)
class TrainedWork:
    """What a step updates.

    Attributes:
        weight_bytes: of what is trained.
    """

    layout: StateLayout
    weight_bytes: int
    training: Training

    @property
    def on_nvme(self) -> bool:
        """States live there."""
        return self.training.state_tier == NVME


def estimate_training(
    training_state: StreamedTraining,
    model: Any,
    plan: Plan,
    spec: ModelSpec,
    workload: Workload,
    predictor: Predictor | None,
    micro_batches: int,
    layer_major: bool,
) -> TrainingEstimate:
    """Args: micro_batches: whose gradients a step adds up."""
    work = TrainedWork(training_state.layout, training_state.trainable.nbytes, training_state.training)
    seconds = None if predictor is None else step_seconds(work, plan, spec, workload, predictor, micro_batches, layer_major)
    sizes = training_state.gradient_bytes, training_state.states.nbytes
    return estimated(work, model, workload, sizes, seconds, micro_batches if layer_major else 1)


def estimated(
    work: TrainedWork,
    model: Any,
    workload: Workload,
    held: tuple[int, int],
    seconds: float | None,
    at_once: int,
) -> TrainingEstimate:
    """The estimate that these make.

    Args:
        held: bytes of gradients, and of states in CPU memory.
        seconds: of a step.
        at_once: micro-batches whose layer inputs are kept.
    """
    return TrainingEstimate(
        trained=sum(group.elements for group in work.layout.groups),
        gradient_bytes=held[0],
        state_bytes=held[1],
        activation_bytes=at_once * inputs_bytes(model, find_structure(model), workload.batch_size * workload.total_tokens),
        activation_tier=work.training.activation_tier,
        disk_bytes=work.layout.nbytes if work.on_nvme else 0,
        written_bytes=work.layout.written_bytes if work.on_nvme else 0,
        step_seconds=seconds,
    )


def step_seconds(
    work: TrainedWork,
    plan: Plan,
    spec: ModelSpec,
    workload: Workload,
    predictor: Predictor,
    micro_batches: int,
    layer_major: bool,
) -> float:
    """Passes forward and back, each the longer of computing and bringing the weights, and then the update."""
    hardware, cost = predictor.hardware, predictor.cost
    prefill, decode = predictor.work(spec, workload.batch_size, workload.total_tokens, workload.total_tokens)
    compute = sum(cost.module(module.work).compute_seconds for part in prefill for module in part.modules)
    forward = predict(plan, spec, cost, prefill, decode).prefill_seconds
    link = hardware.disk_read if hardware.h2d is None else hardware.h2d
    streaming = plan.weights.streamed_bytes / link.bytes_per_second
    rest = max(0.0, forward - max(streaming, compute))
    # A layer is computed again, and differentiated: by its inputs, and by its weights where most of them are trained.
    most = 2 * work.weight_bytes > sum(block.stored_bytes for block in spec.blocks)
    back = 3 if most else 2
    passes, each = (1, micro_batches) if layer_major else (micro_batches, 1)
    running = passes * (max(streaming, each * compute) + max(streaming, back * each * compute) + 2 * rest)
    elements = sum(group.elements for group in work.layout.groups)
    update = elements * _UPDATE_BYTES / hardware.host.memory_bytes_per_second
    if work.on_nvme:
        read = sum(group.states.nbytes + (0 if group.owns_master else group.weights.nbytes) for group in work.layout.groups)
        moved = read / hardware.disk_read.bytes_per_second
        update = max(update, moved + work.layout.written_bytes / hardware.disk_write.bytes_per_second)
    return running + update
