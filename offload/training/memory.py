"""What training holds in CPU memory, known before anything is loaded."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from offload.budgets import Budgets
from offload.model.blocks import Structure, Unit, find_structure
from offload.planning.fit import FittedPlan
from offload.scheduler.model_spec import BlockRole, ModelSpec, Workload
from offload.scheduler.sub_groups import StateLayout, Trained, lay_out
from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES, align_up
from offload.storage.errors import BudgetTooSmall, gib
from offload.training.backward.gradient_transfer import ring_bytes
from offload.training.backward.gradients import gradient_bytes
from offload.training.backward.nvme_activations import INPUT_BUFFERS
from offload.training.chosen import chosen_parameters
from offload.training.optimizer.nvme_states import BUFFER_COUNT
from offload.training.optimizer.update_rules import rule_of
from offload.training.options import CPU, NVME, Training

_SHARED_INPUTS = 4
"""What all layers are given beside their hidden state: positions, masks, what an encoder made; counted as one state each."""


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes of CPU memory, and of disk.

    Attributes:
        gradient_bytes: of all that is trained.
        state_bytes: in CPU memory: all of them, or what passes through buffers.
        activation_bytes: of what layers keep for backward, on the device, or in CPU memory on its way to NVMe.
        reserved_bytes: of these, what is not counted when it comes.
        activations_on_host: they are in CPU memory beside the device.
        disk_bytes: of one version of the states and weights on NVMe.
        written_bytes: to disk, in each step.
    """

    training: Training
    gradient_bytes: int = 0
    state_bytes: int = 0
    activation_bytes: int = 0
    reserved_bytes: int = 0
    activations_on_host: bool = False
    disk_bytes: int = 0
    written_bytes: int = 0

    @property
    def host_bytes(self) -> int:
        return self.gradient_bytes + self.state_bytes

    def device_bytes(self, budgets: Budgets) -> int:
        """What is taken of the budget of the device."""
        activations = 0 if self.activations_on_host else self.activation_bytes
        return activations + (self.host_bytes if budgets.host_bytes is None else 0)

    def beside_device_bytes(self, budgets: Budgets) -> int:
        """What is taken of the budget of CPU memory beside a device."""
        if budgets.host_bytes is None:
            return 0
        activations = self.activation_bytes if self.activations_on_host else 0
        return self.host_bytes + ring_bytes(self.gradient_bytes) + activations

    def left_of(self, budgets: Budgets) -> Budgets:
        """What is left for the model, which may be next to nothing."""
        host_bytes = budgets.host_bytes
        if host_bytes is not None:
            host_bytes = max(1, host_bytes - self.beside_device_bytes(budgets))
        return replace(budgets, device_bytes=max(1, budgets.device_bytes - self.device_bytes(budgets)), host_bytes=host_bytes)

    def refused(self, error: BudgetTooSmall, budgets: Budgets) -> BudgetTooSmall:
        """The refusal of what was left for the model, as one of the whole budget."""
        discrete = budgets.host_bytes is not None
        taken = self.beside_device_bytes(budgets) if error.of_host else self.device_bytes(budgets)
        if not taken:
            return error
        budget = budgets.host_bytes if error.of_host else budgets.device_bytes
        holds = []
        if not discrete or error.of_host:
            holds += [(self.gradient_bytes, "gradients"), (self.state_bytes, "optimizer state")]
        if self.activations_on_host == error.of_host:
            holds.append((self.activation_bytes, "what layers keep for backward"))
        ways = [f"a larger {'cpu_memory' if error.of_host or not discrete else 'gpu_memory'}"]
        if self.training.state_tier == CPU and self.host_bytes and holds:
            ways.append("state_tier='nvme'")
        if self.training.full:
            ways.append("train adapters")
        least = error.least_bytes + taken
        held = ", ".join(f"{gib(nbytes)} of {what}" for nbytes, what in holds if nbytes)
        return BudgetTooSmall(
            f"training holds {held}, and the budget is {gib(budget or 0)}; with the model beside, {gib(least)} "
            f"({least} bytes) would do: give {', or '.join(ways)}. Of what is left for the model: {error}",
            least,
            error.of_host,
        )


def check_whole(spec: ModelSpec, budgets: Budgets, workload: Workload, memory: TrainingMemory) -> None:
    """All weights are stepped in the memory that computes, and live there.

    Raises:
        BudgetTooSmall: if they do not fit.
    """
    least = spec.resident_bytes + workload.kv_bytes(spec) + workload.activation_bytes(spec)
    if least > memory.left_of(budgets).device_bytes:
        said = f"with state_tier='cpu' all weights ({gib(spec.resident_bytes)}) are in CPU memory"
        raise memory.refused(BudgetTooSmall(said, least), budgets)


def check_beside(fitted: FittedPlan, budgets: Budgets, trained_ids: frozenset[int], memory: TrainingMemory) -> None:
    """Weights that are stepped in CPU memory live there, beside the device, and so do all that are streamed then.

    Args:
        fitted: to the device, whatever takes room in CPU memory.

    Raises:
        BudgetTooSmall: if they do not fit.
    """
    weights, sizes = fitted.plan.weights, {block.key: block.slot_bytes for block in fitted.spec.blocks}
    trained_blocks = {
        unit.key for unit in fitted.structure.units if any(id(value) in trained_ids for value in unit.parameters.values())
    }
    needed = sum(sizes[key] for key in weights.streamed) + max(sizes.values())
    left = memory.left_of(budgets).host_bytes
    if left is not None and needed > left and not trained_blocks.isdisjoint(weights.streamed):
        said = f"with state_tier='cpu' all weights that are streamed ({gib(needed)}) are in CPU memory"
        raise memory.refused(BudgetTooSmall(said, needed, of_host=True), budgets)


def training_memory(
    model: nn.Module,
    training: Training,
    tokens: int = 0,
    token_bytes: int = 0,
    structure: Structure | None = None,
    discrete: bool = False,
) -> TrainingMemory:
    """What training holds: of all weights, or of those that require a gradient where others do not.

    Of other training, what is trained is known only later: what layers hold is all that is reserved beforehand.

    Args:
        tokens: of a micro-batch, in all sequences.
        token_bytes: that a layer holds for each of them, in forward.
        structure: how the model is taken apart.
        discrete: the device that computes has memory of its own.
    """
    structure = structure or find_structure(model)
    activation = _activation_bytes(model, structure, training, tokens, token_bytes)
    # What waits in CPU memory beside a device, or passes through it, is charged as it comes.
    on_host = discrete and training.activation_tier in (CPU, NVME)
    reserved = 0 if training.activation_tier == NVME or on_host else activation
    memory = TrainingMemory(training, activation_bytes=activation, reserved_bytes=reserved, activations_on_host=on_host)
    chosen = chosen_parameters(model, training)
    if not chosen:
        return memory
    layout = trained_layout(structure, training, {id(value) for value in chosen})
    on_nvme = training.state_tier != CPU
    return replace(
        memory,
        gradient_bytes=gradient_bytes(chosen, training.masters),
        state_bytes=BUFFER_COUNT * layout.largest_bytes if on_nvme else layout.state_bytes,
        disk_bytes=layout.nbytes if on_nvme else 0,
        written_bytes=layout.written_bytes if on_nvme else 0,
    )


def _activation_bytes(model: nn.Module, structure: Structure, training: Training, tokens: int, token_bytes: int) -> int:
    each = _input_bytes_of(model, structure, tokens)
    pages = [align_up(nbytes, BLOCK_ALIGNMENT_BYTES) for nbytes in each] or [0]
    match training.activation_tier:
        case "nvme":
            return max(pages) * INPUT_BUFFERS
        case "cpu":
            return (sum(pages) + _SHARED_INPUTS * max(pages)) * training.micro_batches
        case "gpu":
            # What a layer holds, however many parts it is streamed in.
            layers = sum(unit.role is BlockRole.LAYER for unit in find_structure(model).units)
            return training.micro_batches * (sum(each) + layers * tokens * token_bytes)
    return training.micro_batches * sum(each)


def inputs_bytes(model: nn.Module, structure: Structure, tokens: int) -> int:
    """Bytes of what all layers are given, in a pass of `tokens`: a hidden state each."""
    return sum(_input_bytes_of(model, structure, tokens))


def _input_bytes_of(model: nn.Module, structure: Structure, tokens: int) -> list[int]:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = int(getattr(text, "hidden_size", 0) or 0)
    dtype = next((value.dtype for value in model.parameters()), torch.float32)
    widths = [_input_width(unit, hidden) for unit in structure.units if unit.role is BlockRole.LAYER]
    return [tokens * width * dtype.itemsize for width in widths]


def _input_width(unit: Unit, hidden: int) -> int:
    """How wide what a layer is given is; of a part of one, at most what its weight shows."""
    if isinstance(unit.module, nn.Linear):
        return unit.module.in_features
    own = [max(value.shape) for value in unit.module.parameters(recurse=False) if value.dim() == 2]
    return max([hidden, *own])


def trained_layout(structure: Structure, training: Training, chosen: set[int]) -> StateLayout:
    """Where the states of the chosen weights would lie."""
    blocks = [(unit.key, list(unit.parameters.items())) for unit in structure.units if unit.parameters]
    blocks.append(("", list(structure.always_resident.items())))
    parts = [(key, [trained(name, value) for name, value in named if id(value) in chosen]) for key, named in blocks]
    return layout_of([(key, part) for key, part in parts if part], training)


def trained(name: str, parameter: nn.Parameter) -> Trained:
    return Trained(name, parameter.numel(), str(parameter.dtype).removeprefix("torch."))


def layout_of(blocks: list[tuple[str, list[Trained]]], training: Training) -> StateLayout:
    masters = None if training.masters is None else str(training.masters).removeprefix("torch.")
    return lay_out(blocks, rule_of(training).moments, masters, training.sub_group_elements)
