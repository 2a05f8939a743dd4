"""What a session does to train, beside what it does anyway."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.config import Budgets
from offload.model.blocks import Structure, Unit, estimated_slot_bytes
from offload.planning.fit import FittedPlan, fit
from offload.runtime.clock import PassClock
from offload.runtime.executor import LayerExecutor
from offload.runtime.layer_major import LayerMajorRunner
from offload.runtime.meters import Meters
from offload.runtime.passes import ModelPass
from offload.runtime.placement import Placement
from offload.scheduler.model_spec import ActivationSizes, Workload
from offload.storage.block_file import spill_folder
from offload.storage.blocks import BlockKey
from offload.storage.devices.base import Device
from offload.storage.reader import DiskReader
from offload.storage.transfer import Link
from offload.training.backward.activation_offload import ActivationStore, CpuActivations, NvmeActivations
from offload.training.backward.chunked_loss import ChunkedLoss
from offload.training.backward.gradients import HostGradients, TiedUse, tied_uses
from offload.training.backward.module_wrapper import TrainedModule
from offload.training.backward.recompute import Backward
from offload.training.memory import TrainingMemory, training_memory
from offload.training.optimizer.checkpoint import Checkpoints, identity_of
from offload.training.optimizer.streamed_optimizer import StreamedTraining
from offload.training.options import CPU, NVME, Training

INPUTS = "layers' inputs"
"""The category of what layers keep for backward."""

Loss = Callable[[], torch.Tensor]


def fit_training(
    model: nn.Module,
    training: Training,
    budgets: Budgets,
    workload: Workload,
    slot_bytes: Callable[[Unit], int],
    activations: ActivationSizes | None,
) -> tuple[FittedPlan, TrainingMemory]:
    """Plan the model beside what training holds.

    Raises:
        BudgetTooSmall: if they do not fit together.
    """
    token_bytes = 0 if activations is None else activations.token_bytes
    memory = training_memory(model, training, workload.batch_size * workload.total_tokens, token_bytes)
    discrete = budgets.host_bytes is not None
    if training.activation_tier == CPU and discrete:
        # They wait in CPU memory, which is charged as they come.
        memory = replace(memory, activation_bytes=0, reserved_bytes=0)
    in_files = training.full and training.state_tier == NVME
    fitted = fit(
        model,
        memory.left_of(training, budgets),
        workload,
        (lambda unit: max(slot_bytes(unit), estimated_slot_bytes(unit))) if in_files else slot_bytes,
        activations,
        allow_splits=False,
        # Nothing that is trained stays on a device whose memory the states do not share.
        candidates=frozenset[str]() if training.full and discrete else None,
    )
    memory.check(fitted.plan, training, budgets, sum(value.nbytes for value in model.parameters()))
    if discrete:
        return fitted, memory
    pinned_bytes = fitted.spec.always_resident_bytes + memory.host_bytes + memory.activation_bytes
    return replace(fitted, spec=replace(fitted.spec, always_resident_bytes=pinned_bytes)), memory


class TrainingComponent:
    """Backward through streamed blocks, gradients, the session's optimizer and its checkpoints.

    Args:
        training: what was asked.
        at_once: the session's optimizer is used from the first pass on; else when it is asked for.
        writes: the link to the disk.
        state_folder: where states are written, where `training` does not say.
        adopt: has the session see what was added to the model.
        make_room: has it give up resident blocks, for so many bytes.
    """

    def __init__(
        self,
        training: Training,
        at_once: bool,
        device: Device,
        executor: LayerExecutor,
        clock: PassClock,
        placement: Placement,
        reader: DiskReader,
        writes: Link,
        meters: Meters,
        state_folder: str | None,
        adopt: Callable[[], None],
        make_room: Callable[[int], None],
    ) -> None:
        self.training = training
        self.streamed_training: StreamedTraining | None = None
        self.backward = Backward(executor, clock, self._begin_gradients, self._end_gradients)
        self._at_once = at_once
        self._device = device
        self._executor, self._clock = executor, clock
        self._placement, self._reader, self._writes = placement, reader, writes
        self._meters = meters
        self._state_folder = state_folder
        self._adopt, self._make_room = adopt, make_room
        self._gradients = HostGradients(discrete=not device.shares_host_memory)
        self._ties: list[TiedUse] = []
        self._inputs: ActivationStore | None = None
        self._checkpoints: Checkpoints | None = None

    def install(self, model: nn.Module, structure: Structure, stack: ExitStack) -> list[str]:
        """Take hold of the model, inside of all windows; the stack lets go of it.

        Returns:
            What is to be told.
        """
        self._model, self._structure = model, structure
        notes = []
        stack.callback(self._stop)
        if self.training.loss_chunk:
            stack.callback(ChunkedLoss(model, self.training.loss_chunk, self.backward.begin_within).undo)
            notes.append("loss_chunk: sums of the loss are in another order; exactness is rounding")
        if self.training.activation_tier == CPU and self._device.shares_host_memory:
            notes.append("activation_tier='cpu' is what 'recompute' does where the CPU computes")
        self._ties = tied_uses(model)
        self._inputs = self._open_inputs()
        return notes

    def wrapper(self, unit: Unit) -> TrainedModule:
        tier, tables = self.training.activation_tier, self._placement.tables
        return TrainedModule(unit, self._executor, self._clock, tables, self.backward, tier, self._inputs, self._ensure)

    def before_pass(self) -> None:
        """A forward pass is about to begin."""
        if torch.is_grad_enabled():
            if self._at_once and any(value.requires_grad for value in self._model.parameters()):
                self.optimize()
            if self.streamed_training is None and not self._device.shares_host_memory:
                self._gather_streamed()
        # A backward pass that failed half way still holds a block.
        self.backward.end()

    def optimize(self) -> StreamedTraining:
        """The session's optimizer, made when it is first asked for."""
        if self.streamed_training is None:
            with self._executor.lock:
                self._adopt()
                self._gradients.close()
                self.streamed_training = StreamedTraining(
                    self._model,
                    self.training,
                    self._structure,
                    self._ties,
                    self._placement,
                    self._executor,
                    self._reader,
                    self._writes,
                    self._meters.host_ledger,
                    self._meters.disk_ledger,
                    not self._device.shares_host_memory,
                    self._folder,
                    self._make_room,
                )
                self._gradients = self.streamed_training.gradients
                self._executor.before_load = self.streamed_training.ensure
        return self.streamed_training

    def run(self, losses: Sequence[Loss], layer_major: bool, model_pass: ModelPass) -> list[float]:
        """Forward and backward of micro-batches; see `Session.backward`."""
        if not layer_major or len(losses) == 1:
            # Without the lock: on a card, backward runs in a thread of torch's, which takes it for each block.
            return [_loss_and_backward(compute) for compute in losses]
        with self._executor.lock:
            rounds = LayerMajorRunner(self._executor, self._clock)
            with torch.enable_grad():
                with model_pass.as_one():
                    values = rounds.run(losses)
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
    def fallbacks(self) -> list[str]:
        """What is slower than it could be, and why."""
        said = []
        if self.streamed_training is not None and self.streamed_training.buffered:
            said.append(f"{self._folder}: the filesystem refuses O_DIRECT, so states are written through the page cache")
        if self._checkpoints is not None and self._checkpoints.copied:
            said.append(
                f"{self._checkpoints.folder} is on another filesystem than the states in {self._folder}, or on one that cannot "
                "name a file later: each checkpoint is a copy"
            )
        if self._inputs is not None and self._inputs.pageable:
            said.append("CPU memory for layers' inputs could not be page-locked: their copies do not overlap with compute")
        return said

    @property
    def host_bytes(self) -> int:
        """That gradients and states hold at most."""
        return 0 if self.streamed_training is None else self.streamed_training.peak_bytes

    @property
    def _folder(self) -> str:
        return self.training.state_dir or self._state_folder or spill_folder()

    def _checkpoints_in(self, folder: str | Path, sources: Iterable[str]) -> Checkpoints:
        managed = self.optimize()
        if self._checkpoints is None or self._checkpoints.folder != Path(folder):
            if self._checkpoints is not None:
                last, self._checkpoints = self._checkpoints, None
                last.close()
            self._checkpoints = Checkpoints(folder, managed, identity_of(self._model, sources))
        return self._checkpoints

    def _open_inputs(self) -> ActivationStore | None:
        """Where what layers were given waits for backward; None for the device itself."""

        def charge(nbytes: int) -> None:
            ledger = self._meters.host_ledger
            ledger.charge(INPUTS, nbytes) if nbytes >= 0 else ledger.release(INPUTS, -nbytes)

        if self.training.activation_tier == NVME:
            return NvmeActivations(self._device, self._folder, self._reader.link, self._writes, charge)
        if self.training.activation_tier == CPU and not self._device.shares_host_memory:
            return CpuActivations(self._device, charge)
        return None

    def _ensure(self, keys: Sequence[BlockKey]) -> None:
        if self.streamed_training is not None:
            self.streamed_training.ensure(keys)

    def _gather_streamed(self) -> None:
        """On a device with memory of its own, gradients of streamed weights go to CPU memory, whoever uses them."""
        self._gradients.add(
            {
                key: [(home.name, home.parameter) for home in block.homes if home.parameter.requires_grad]
                for key, block in self._placement.streamed.items()
            }
        )

    def _begin_gradients(self) -> None:
        if self.streamed_training is not None:
            # Gradients of what no forward came to are still to be used.
            self.streamed_training.finish()
        self._gradients.begin()

    def _end_gradients(self) -> None:
        self._gradients.end()
        self._placement.expect_changes()

    def _backward_in_turn(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
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
        ledger = self._meters.host_ledger
        with ExitStack() as stack:
            for category in ("gradients", "optimizer states"):
                stack.callback(ledger.release, category, ledger.held_bytes(category))
            stack.callback(self.streamed_training.close)


def _loss_and_backward(compute: Loss) -> float:
    loss = compute()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()
