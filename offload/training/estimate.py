"""What a training will take, told before its first step."""

from typing import Any

from offload.model.blocks import find_structure
from offload.planning.predictor import Predictor
from offload.report.training import TrainingEstimate
from offload.scheduler.model_spec import ModelSpec, Workload
from offload.scheduler.plan import Plan
from offload.scheduler.prediction import predict
from offload.training.memory import inputs_bytes
from offload.training.optimizer.streamed_optimizer import StreamedTraining
from offload.training.options import NVME

_UPDATE_BYTES = 28
"""Bytes of memory traffic for each element that AdamW steps: four tensors read, three written."""


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
    on_nvme = training_state.training.state_tier == NVME
    at_once = micro_batches if layer_major else 1
    return TrainingEstimate(
        trained=training_state.trainable.elements,
        gradient_bytes=training_state.gradient_bytes,
        state_bytes=training_state.states.nbytes,
        activation_bytes=at_once * inputs_bytes(model, find_structure(model), workload.batch_size * workload.total_tokens),
        activation_tier=training_state.training.activation_tier,
        disk_bytes=training_state.layout.nbytes if on_nvme else 0,
        written_bytes=training_state.layout.written_bytes if on_nvme else 0,
        step_seconds=None
        if predictor is None
        else step_seconds(training_state, plan, spec, workload, predictor, micro_batches, layer_major),
    )


def step_seconds(
    training_state: StreamedTraining,
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
    # A layer is computed again, and differentiated: by its inputs, and by its weights where they are trained.
    back = 3 if training_state.trains_most_of(sum(block.stored_bytes for block in spec.blocks)) else 2
    passes, each = (1, micro_batches) if layer_major else (micro_batches, 1)
    running = passes * (max(streaming, each * compute) + max(streaming, back * each * compute) + 2 * rest)
    elements = sum(group.elements for group in training_state.layout.groups)
    update = elements * _UPDATE_BYTES / hardware.host.memory_bytes_per_second
    if training_state.training.state_tier == NVME:
        read = sum(
            group.states.nbytes + (0 if group.owns_master else group.weights.nbytes) for group in training_state.layout.groups
        )
        moved = read / hardware.disk_read.bytes_per_second
        update = max(update, moved + training_state.layout.written_bytes / hardware.disk_write.bytes_per_second)
    return running + update
