"""Training in a session: backward through streamed blocks, the session's optimizer, checkpoints."""

import platform
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.config import IDENTICAL, ROUNDING
from offload.model.blocks import Unit
from offload.runtime.call import Call
from offload.runtime.component import Component, LivePlan
from offload.runtime.executor import LayerExecutor
from offload.runtime.layer_major import LayerMajorRunner
from offload.runtime.machine import Machine
from offload.runtime.module_wrappers import OnloadedModule
from offload.runtime.passes import ModelPass
from offload.storage.blocks import BlockKey
from offload.storage.errors import BudgetExceeded
from offload.training.backward.activation_offload import ActivationStore, CpuActivations
from offload.training.backward.chunked_loss import ChunkedLoss
from offload.training.backward.gradients import HostGradients, TiedUse, tied_uses
from offload.training.backward.module_wrapper import TrainedModule
from offload.training.backward.nvme_activations import NvmeActivations
from offload.training.backward.recompute import Backward
from offload.training.beside import STEP_THEM, parameters_beside
from offload.training.memory import TrainingMemory
from offload.training.optimizer.checkpoint import Checkpoints, identity_of
from offload.training.optimizer.streamed_optimizer import StreamedTraining, folder_of
from offload.training.options import CPU, NVME, Training

INPUTS = "layer inputs"
"""The category of what layers keep for backward."""

Loss = Callable[[], torch.Tensor]


class TrainingComponent(Component):
    """Backward through streamed blocks, gradients, the session's optimizer and its checkpoints.

    Args:
        training: what was asked.
        memory: what was reserved for it.
        at_once: the session's optimizer is used from the first pass on; else when it is asked for.
    """

    name = "training"
    reads_weights = True

    def __init__(
        self,
        training: Training,
        at_once: bool,
        machine: Machine,
        executor: LayerExecutor,
        live: LivePlan,
        memory: TrainingMemory,
    ) -> None:
        self.training = training
        self.streamed_training: StreamedTraining | None = None
        self.backward = Backward(executor, machine.clock, self._begin_gradients, self._end_gradients)
        self._at_once = at_once
        self._machine = machine
        self._memory = memory
        self._executor, self._live = executor, live
        self._gradients = HostGradients(machine)
        self._ties: list[TiedUse] = []
        self._looked_beside = False
        self._inputs: ActivationStore | None = None
        self._checkpoints: Checkpoints | None = None

    def open(self, model: nn.Module, stack: ExitStack) -> None:
        self._machine.ledger.charge(INPUTS, self._memory.reserved_bytes)
        stack.callback(self._machine.ledger.release, INPUTS, self._memory.reserved_bytes)

    def free_slots(self) -> None:
        self.backward.end()

    def check_growth(self) -> None:
        if self.streamed_training is not None:
            raise BudgetExceeded(
                "more memory is needed than was set aside when training began, and nothing is given up meanwhile; enter with "
                "the batch_size and max_tokens that will be used"
            )

    def attach(self, model: nn.Module, stack: ExitStack) -> None:
        self._model, warn = model, self._machine.notes.warn
        stack.callback(self._stop)
        if self.training.loss_chunk:
            stack.callback(ChunkedLoss(model, self.training.loss_chunk, self.backward.begin_within).undo)
            warn("loss_chunk: sums of the loss are in another order; exactness is rounding")
        if self.training.activation_tier == CPU and not self._machine.discrete:
            warn("activation_tier='cpu' is what 'recompute' does where the CPU computes")
        if not self._machine.discrete and (dtype := slow_backward_dtype(model)) is not None:
            warn(
                f"this processor has no instructions for {dtype}: torch's backward in it takes many times as long as in "
                "float32, which takes twice the memory (--dtype float32, dtype='float32')"
            )
        self._ties = tied_uses(model)
        self._inputs = self._open_inputs()

    def wrapper(self, unit: Unit) -> OnloadedModule:
        tier, tables, clock = self.training.activation_tier, self._live.placement.tables, self._machine.clock
        return TrainedModule(unit, self._executor, clock, tables, self.backward, tier, self._inputs, self._ensure)

    def before_pass(self, call: Call) -> None:
        if torch.is_grad_enabled():
            if self._at_once and any(value.requires_grad for value in self._model.parameters()):
                self.optimize()
            if self.streamed_training is None and self._machine.discrete:
                self._gather_streamed()
        # A backward pass that failed half way still holds a block.
        self.backward.end()

    def optimize(self) -> StreamedTraining:
        """The session's optimizer, made when it is first asked for."""
        if self.streamed_training is None:
            with self._executor.lock:
                self._live.adopt_if_changed()
                self._gradients.close()
                self.streamed_training = StreamedTraining(
                    self._model,
                    self.training,
                    self._live.structure,
                    self._ties,
                    self._live.placement,
                    self._executor,
                    self._machine,
                    self._live.make_room,
                )
                self._gradients = self.streamed_training.gradients
                self._executor.before_load = self.streamed_training.ensure
        return self.streamed_training

    def run(self, losses: Sequence[Loss], layer_major: bool, model_pass: ModelPass) -> list[float]:
        """Forward and backward of micro-batches; see `Session.backward`."""
        if not layer_major or len(losses) == 1:
            # Without the lock: on a card, backward runs in a thread of torch's, which takes it for each block.
            return [self._loss_and_backward(compute) for compute in losses]
        with self._executor.lock:
            rounds = LayerMajorRunner(self._executor, self._machine.clock)
            with torch.enable_grad():
                with model_pass.as_one():
                    values = rounds.run(losses)
                self._look_beside(values[0])
                self.backward.begin()
                try:
                    rounds.run([partial(self._backward_in_turn, value) for value in values])
                finally:
                    self.backward.end()
            return [value.item() for value in values]

    def save(self, folder: str | Path, progress: Mapping[str, Any], sources: Iterable[str]) -> None:
        self.optimize().finish()
        self._checkpoints_in(folder, sources).save(progress)

    def resume(self, folder: str | Path, sources: Iterable[str]) -> dict[str, Any] | None:
        return self._checkpoints_in(folder, sources).resume()

    @property
    def exactness(self) -> str:
        return ROUNDING if self.training.loss_chunk else IDENTICAL

    @property
    def notes(self) -> Sequence[str]:
        said = []
        if self.streamed_training is not None and self.streamed_training.buffered:
            said.append(f"{self._folder}: the filesystem refuses O_DIRECT, so states are written through the page cache")
        if self._checkpoints is not None and self._checkpoints.copied:
            said.append(
                f"{self._checkpoints.folder} is on another filesystem than the states in {self._folder}, or on one that cannot "
                "name a file later: each checkpoint is a copy"
            )
        if self._inputs is not None and self._inputs.pageable:
            said.append("CPU memory for layer inputs could not be page-locked: their copies do not overlap with compute")
        return said

    @property
    def held_bytes(self) -> int:
        states = 0 if self.streamed_training is None else self.streamed_training.peak_bytes
        return self._memory.activation_bytes + states

    @property
    def _folder(self) -> str:
        return folder_of(self.training, self._machine)

    def _checkpoints_in(self, folder: str | Path, sources: Iterable[str]) -> Checkpoints:
        training_state = self.optimize()
        if self._checkpoints is None or self._checkpoints.folder != Path(folder):
            if self._checkpoints is not None:
                last, self._checkpoints = self._checkpoints, None
                last.close()
            self._checkpoints = Checkpoints(folder, training_state, identity_of(self._model, sources))
        return self._checkpoints

    def _open_inputs(self) -> ActivationStore | None:
        """Where what layers were given waits for backward; None for the device itself."""

        def charge(nbytes: int) -> None:
            ledger = self._machine.host.ledger
            ledger.charge(INPUTS, nbytes) if nbytes >= 0 else ledger.release(INPUTS, -nbytes)

        if self.training.activation_tier == NVME:
            return NvmeActivations(
                self._machine.device, self._folder, self._machine.host.reads, self._machine.host.writes, charge
            )
        if self.training.activation_tier == CPU and self._machine.discrete:
            return CpuActivations(self._machine.device, charge)
        return None

    def _ensure(self, keys: Sequence[BlockKey]) -> None:
        if self.streamed_training is not None:
            self.streamed_training.ensure(keys)

    def _gather_streamed(self) -> None:
        """On a device with memory of its own, gradients of streamed weights go to CPU memory, whoever uses them."""
        self._gradients.add(
            {
                key: [(home.name, home.parameter) for home in block.homes if home.parameter.requires_grad]
                for key, block in self._live.placement.streamed.items()
            }
        )

    def _begin_gradients(self) -> None:
        if self.streamed_training is not None:
            # Gradients of what no forward came to are still to be used.
            self.streamed_training.finish()
        self._gradients.begin()

    def _end_gradients(self) -> None:
        self._gradients.end()
        self._live.placement.expect_changes()

    def _loss_and_backward(self, compute: Loss) -> float:
        loss = compute()
        self._look_beside(loss)
        loss.backward()
        return loss.item()

    def _look_beside(self, loss: torch.Tensor) -> None:
        """Say once what gets gradients and is not stepped by the session's optimizer."""
        if self._looked_beside:
            return
        self._looked_beside = True
        strays = parameters_beside(loss, {id(value) for value in self._model.parameters()})
        if strays and self.streamed_training is not None:
            shapes = ", ".join(str(list(value.shape)) for value in strays[:4])
            warnings.warn(
                f"the loss depends on {len(strays)} parameters beside the model ({shapes}), which session.optimizer does not "
                f"step: {STEP_THEM}",
                stacklevel=5,
            )

    def _backward_in_turn(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.backward.release()

    def _stop(self) -> None:
        with ExitStack() as stack:
            if self._inputs is not None:
                stack.callback(self._inputs.close)
            for tie in self._ties:
                stack.callback(tie.undo)
            stack.callback(self._leave)
            if self._checkpoints is not None:
                stack.callback(self._checkpoints.close)

    def _leave(self) -> None:
        if self.streamed_training is None:
            self._gradients.close()
            return
        ledger = self._machine.host.ledger
        with ExitStack() as stack:
            for category in ("gradients", "optimizer state"):
                stack.callback(ledger.release, category, ledger.held_bytes(category))
            stack.callback(self.streamed_training.close)


def slow_backward_dtype(model: nn.Module) -> str | None:
    """The dtype of weights whose backward this processor has no instructions for; None if there is none."""
    half = {value.dtype for value in model.parameters()} & {torch.bfloat16, torch.float16}
    native = platform.machine() != "x86_64" or torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
    return None if native or not half else min(str(dtype).removeprefix("torch.") for dtype in half)
