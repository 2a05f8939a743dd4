"""What training holds in CPU memory, known before anything is loaded."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from offload.config import Budgets
from offload.model.blocks import find_structure
from offload.scheduler.model_spec import BlockRole
from offload.scheduler.plan import Plan
from offload.scheduler.sub_groups import StateLayout, Trained, lay_out
from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES, align_up
from offload.storage.errors import BudgetTooSmall, gib
from offload.training.backward.activation_offload import INPUT_BUFFERS
from offload.training.backward.gradient_transfer import ring_bytes
from offload.training.backward.gradients import gradient_bytes
from offload.training.optimizer.nvme_states import BUFFER_COUNT
from offload.training.optimizer.update_rules import rule_of
from offload.training.options import CPU, GPU, NVME, Training


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes of CPU memory, and of disk.

    Attributes:
        gradient_bytes: of all that is trained.
        state_bytes: in CPU memory: all of them, or what passes through buffers.
        activation_bytes: of what layers keep for backward, on the device, or in CPU memory on its way to NVMe.
        reserved_bytes: of these, what is not counted when it comes.
        disk_bytes: of one version of the states and weights on NVMe.
        written_bytes: to disk, in each step.
    """

    gradient_bytes: int = 0
    state_bytes: int = 0
    activation_bytes: int = 0
    reserved_bytes: int = 0
    disk_bytes: int = 0
    written_bytes: int = 0

    @property
    def host_bytes(self) -> int:
        return self.gradient_bytes + self.state_bytes

    def left_of(self, training: Training, budgets: Budgets) -> Budgets:
        """What is left for the model.

        Raises:
            BudgetTooSmall: if nothing is.
        """
        budgets = replace(budgets, device_bytes=max(1, budgets.device_bytes - self.activation_bytes))
        budget = budgets.device_bytes if budgets.host_bytes is None else budgets.host_bytes
        if budget <= self.host_bytes:
            ways = ["a larger cpu_memory"] + (["state_tier='nvme'"] if training.state_tier == CPU else [])
            raise BudgetTooSmall(
                f"training holds {gib(self.gradient_bytes)} of gradients and {gib(self.state_bytes)} of optimizer state "
                f"in CPU memory, whose budget is {gib(budget)}; give {', or '.join(ways)}, or train adapters",
                self.host_bytes,
            )
        if budgets.host_bytes is None:
            return replace(budgets, device_bytes=budget - self.host_bytes)
        return replace(budgets, host_bytes=max(1, budget - self.host_bytes - ring_bytes(self.gradient_bytes)))

    def check(self, plan: Plan, training: Training, budgets: Budgets, weight_bytes: int) -> None:
        """Weights that are stepped in CPU memory live there.

        Raises:
            BudgetTooSmall: if they do not fit.
        """
        elsewhere = (*plan.weights.streamed, *plan.weights.row_fetched)
        if budgets.host_bytes is not None:
            elsewhere = tuple(key for key in plan.weights.streamed if key not in plan.weights.in_host_memory)
        if training.full and training.state_tier == CPU and elsewhere:
            raise BudgetTooSmall(
                f"with state_tier='cpu' all weights ({gib(weight_bytes)}) are in CPU memory, beside {gib(self.gradient_bytes)} "
                f"of gradients and {gib(self.state_bytes)} of states, and {len(elsewhere)} blocks do not fit; give a larger "
                "cpu_memory, or state_tier='nvme'",
                self.host_bytes + weight_bytes,
            )


def training_memory(model: nn.Module, training: Training, tokens: int = 0, token_bytes: int = 0) -> TrainingMemory:
    """What training all weights holds; of other training, only what layers hold is reserved beforehand.

    Args:
        tokens: of a micro-batch, in all sequences.
        token_bytes: that a layer holds for each of them, in forward.
    """
    activation = _activation_bytes(model, training, tokens, token_bytes)
    reserved = 0 if training.activation_tier == NVME else activation
    if not training.full:
        return TrainingMemory(activation_bytes=activation, reserved_bytes=reserved)
    layout = full_layout(model, training)
    on_nvme = training.state_tier != CPU
    return TrainingMemory(
        gradient_bytes(model.parameters(), training.masters),
        BUFFER_COUNT * layout.largest_bytes if on_nvme else layout.state_bytes,
        activation,
        reserved,
        layout.nbytes if on_nvme else 0,
        layout.written_bytes if on_nvme else 0,
    )


def _activation_bytes(model: nn.Module, training: Training, tokens: int, token_bytes: int) -> int:
    layers = sum(unit.role is BlockRole.LAYER for unit in find_structure(model).units)
    if training.activation_tier == NVME:
        each = align_up(inputs_bytes(model, tokens) // max(1, layers), BLOCK_ALIGNMENT_BYTES)
        return each * INPUT_BUFFERS
    inputs = training.micro_batches * inputs_bytes(model, tokens)
    if training.activation_tier != GPU:
        return inputs
    return inputs + training.micro_batches * layers * tokens * token_bytes


def inputs_bytes(model: nn.Module, tokens: int) -> int:
    """Bytes of what all layers are given, in a pass of `tokens`: a hidden state each."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = [unit for unit in find_structure(model).units if unit.role is BlockRole.LAYER]
    dtype = next((value.dtype for value in model.parameters()), torch.float32)
    return len(layers) * tokens * int(getattr(text, "hidden_size", 0) or 0) * dtype.itemsize


def full_layout(model: nn.Module, training: Training) -> StateLayout:
    """Where the states of all weights would lie."""
    structure = find_structure(model)
    blocks = [(unit.key, list(unit.parameters.items())) for unit in structure.units if unit.parameters]
    blocks.append(("", list(structure.always_resident.items())))
    return layout_of([(key, [trained(name, value) for name, value in named]) for key, named in blocks], training)


def trained(name: str, parameter: nn.Parameter) -> Trained:
    return Trained(name, parameter.numel(), str(parameter.dtype).removeprefix("torch."))


def layout_of(blocks: list[tuple[str, list[Trained]]], training: Training) -> StateLayout:
    masters = None if training.masters is None else str(training.masters).removeprefix("torch.")
    return lay_out(blocks, rule_of(training).moments, masters, training.sub_group_elements)
