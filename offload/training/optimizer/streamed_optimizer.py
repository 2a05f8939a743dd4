"""The session's own optimizer: gradients in CPU memory, states in CPU memory or on NVMe, weights where they are streamed from.

backward -> gradients (host) -> norm, clip -> for each sub-group: states in -> step -> weights and states out
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from offload.model.blocks import Structure
from offload.model.homes import ParameterHome
from offload.runtime.executor import LayerExecutor
from offload.runtime.machine import Machine
from offload.runtime.placement import Placement
from offload.scheduler.sub_groups import SubGroup
from offload.storage.block_file import check_folder, spill_folder
from offload.storage.blocks import BlockKey
from offload.storage.errors import DiskFull, SessionError, TrainingError, gib
from offload.storage.state_file import StateFile
from offload.storage.transfer import Link
from offload.training.backward.gradient_transfer import ring_bytes
from offload.training.backward.gradients import HostGradients, TiedUse, gradient_dtype
from offload.training.beside import STEP_THEM
from offload.training.memory import layout_of, trained
from offload.training.optimizer.cpu_states import CpuStates
from offload.training.optimizer.nvme_states import BUFFER_COUNT, NvmeStates
from offload.training.optimizer.states import States, StateSnapshot
from offload.training.optimizer.trainable_set import TrainableSet
from offload.training.optimizer.trained_weights import OUTSIDE, TrainedWeights
from offload.training.optimizer.update_rules import UpdateRule, rule_of
from offload.training.options import CPU, Training

_STATES = "optimizer state"


class StreamedOptimizer(torch.optim.Optimizer):
    """What learning-rate schedulers and loops see: `param_groups`, `step` and `zero_grad`. Its states live elsewhere.

    Args:
        step: updates everything, with the settings of the only group.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], defaults: dict[str, Any], step: Callable[[], None]) -> None:
        self._made = False
        super().__init__(list(parameters), dict(defaults))
        self._made = True
        self._update = step
        self.steps = 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: states are laid out once, for what requires a gradient in the model.

        Raises:
            SessionError: always, once the optimizer is made.
        """
        if self._made:
            raise SessionError(f"session.optimizer steps the parameters of the model that require a gradient; {STEP_THEM}")
        super().add_param_group(param_group)

    def step(self, closure: Any = None) -> Any:
        """One update of everything that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        self.steps += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The settings. The states are in a checkpoint only: `session.save`.

        Raises:
            SessionError: once there are states, which would be missing.
        """
        if self.steps:
            raise SessionError("this optimizer's states are too large for a state_dict; use session.save(folder)")
        return super().state_dict()


def folder_of(training: Training, machine: Machine) -> str:
    """Where files of states are made."""
    return training.state_dir or machine.host.disk_dir or spill_folder()


class StreamedTraining:
    """Everything that a session trains by itself.

    Args:
        structure: of the model; says which block a parameter belongs to.
        ties: places where a parameter is used once more.
        make_room: told how much CPU memory will be held, before it is.
    """

    def __init__(
        self,
        model: nn.Module,
        training: Training,
        structure: Structure,
        ties: Iterable[TiedUse],
        placement: Placement,
        executor: LayerExecutor,
        machine: Machine,
        make_room: Callable[[int], None],
    ) -> None:
        self.trainable = TrainableSet.of(model)
        if any(parameter.grad is not None for parameter in self.trainable):
            raise SessionError(
                "parameters already have gradients that this optimizer did not accumulate; ask for session.optimizer before "
                "the first backward, or give offload(..., training=Training(...))"
            )
        self.training = training
        self._model = model
        self._executor = executor
        self._host_ledger, self._disk_ledger = machine.host.ledger, machine.host.disk_ledger
        self._folder = folder_of(training, machine)
        self._engine = machine.host.engine
        self.buffered = False
        """The filesystem refuses O_DIRECT for files of states."""
        self._rule: UpdateRule = rule_of(training)
        self._steps_of: dict[str, int] = {}
        self._failure: BaseException | None = None
        self._updating = False
        """A step is not finished."""
        self._coming: deque[SubGroup] = deque()
        self._late: set[BlockKey] = set()
        """Blocks whose last update is not in its place."""
        self._counted: set[str] = set()
        self._clears = False
        """Gradients are forgotten as soon as they are used."""
        self._overlaps = False
        self.weights = TrainedWeights(model, self.trainable.parameters, structure, placement, executor, machine.host.reader)
        blocks = self.weights.blocks
        self.layout = layout_of(
            [(key, [trained(home.name, home.parameter) for home in homes]) for key, homes in blocks.items()], training
        )
        self.weights.layout = self.layout
        self.optimizer = StreamedOptimizer(self.trainable.parameters, self._rule.defaults, self._update)
        executor.settle()
        make_room(self._host_bytes())
        self._look_at_the_disk()
        if training.state_tier == CPU:
            self.weights.leave_files()
        self.gradients = self._take_gradients(blocks, ties, machine)
        self.states: States = self._take_states(machine.host.reads, machine.host.writes)
        self.weights.take_over()

    def step(self, max_grad_norm: float | None = None, overlap: bool = False) -> float:
        """Clip the gradients, update what is trained, and forget the gradients.

        Args:
            max_grad_norm: of all gradients together; None to leave them as they are.
            overlap: each block is updated when the next forward comes to it, while those before it are computed.

        Returns:
            The norm before.

        Raises:
            TrainingError: if it is no number; nothing was changed.
        """
        if max_grad_norm is None:
            norm = float(torch.nn.utils.get_total_norm([value.grad for value in self.trainable if value.grad is not None]))
        else:
            norm = float(torch.nn.utils.clip_grad_norm_(self.trainable.parameters, max_grad_norm))
        if not math.isfinite(norm):
            raise TrainingError(
                f"the norm of the gradients is {norm}: the weights are left as they were. Give a smaller learning rate, or "
                "look at the data"
            )
        self.finish()
        self._clears, self._overlaps = True, overlap
        try:
            self.optimizer.step()
        finally:
            self._overlaps = False
        return norm

    def ensure(self, keys: Sequence[BlockKey]) -> None:
        """The blocks are about to be used: their update is over when this returns, and that of the next one is on its way."""
        self._check_whole()
        if self._late.isdisjoint(keys):
            return
        with self._executor.lock, torch.no_grad():
            while any(group.block in keys for group in self._coming):
                self._step_next()
            for key in keys:
                self.states.settle(key)
            self._late -= set(keys)
            ahead = self._coming[0].block if self._coming else ""
            while self._coming and self._coming[0].block == ahead and self.states.is_there(self._coming[0]):
                self._step_next()

    def finish(self) -> None:
        """Update what is left of the last step."""
        self._check_whole()
        if not self._updating:
            return
        with self._executor.lock, torch.no_grad():
            while self._coming:
                self._step_next()
            self.states.end()
            self._late.clear()
            self._updating = self._clears = False
            for name in self._counted:
                self._steps_of[name] = self._steps_of.get(name, 0) + 1
            self.weights.accept_changes()

    def close(self) -> None:
        """Give memory and files back; the weights stay where they are."""
        try:
            if self._failure is None:
                self.finish()
        finally:
            self.gradients.close()
            self.states.close()

    def _check_whole(self) -> None:
        if self._failure is not None:
            raise SessionError(
                f"an update failed half way ({self._failure}): the weights are of two steps. Leave the context, and resume "
                "from a checkpoint"
            ) from self._failure

    def _update(self) -> None:
        self._begin_update()
        if not self._overlaps:
            self.finish()

    def _begin_update(self) -> None:
        self.finish()
        self._check_parameters()
        with self._executor.lock, torch.no_grad():
            self._late = {group.block for group in self.layout.groups}
            # What was loaded ahead is stale from now on.
            self._executor.drop(self._late)
            self.weights.note_changes()
            self.states.begin()
            self._updating = True
            self._coming.extend(self.layout.groups)
            self._counted.clear()
        # No module waits for it when it is onloaded.
        self.ensure((OUTSIDE,))

    def _step_next(self) -> None:
        group = self._coming.popleft()
        try:
            working = self.states.take(group)
            self._step_group(group, working, self._counted)
            self.states.give_back(working)
        except BaseException as error:
            self._failure = error
            raise
        if self._clears and not (self._coming and self._coming[0].block == group.block):
            for name in {piece.parameter.name for other in self.layout.of(group.block) for piece in other.pieces}:
                self.weights.homes[name].parameter.grad = None

    def _step_group(self, group: SubGroup, working: Any, counted: set[str]) -> None:
        """What has no gradient is left alone, as torch does; pieces that took the same number of steps go together."""
        by_count: dict[int, list[int]] = {}
        for index, piece in enumerate(group.pieces):
            name = piece.parameter.name
            if self.weights.homes[name].parameter.grad is not None:
                by_count.setdefault(self._steps_of.get(name, 0) + 1, []).append(index)
                counted.add(name)
        for count, indices in by_count.items():
            targets = [working.targets[index] for index in indices]
            gradients = [self._gradient(group, index, targets[place]) for place, index in enumerate(indices)]
            moments = {item.name: [working.tensors[item.name][index] for index in indices] for item in self._rule.moments}
            self._rule.step(targets, gradients, moments, count, self.optimizer.param_groups[0])

    def _gradient(self, group: SubGroup, index: int, like: torch.Tensor) -> torch.Tensor:
        piece = group.pieces[index]
        gradient = self.weights.homes[piece.parameter.name].parameter.grad
        assert gradient is not None
        return gradient.reshape(-1)[piece.start : piece.stop].to(like.device, like.dtype)

    def _check_parameters(self) -> None:
        if not self.trainable.is_of(self._model):
            raise SessionError(
                "other parameters require a gradient than when session.optimizer was first asked for; decide what is trained "
                "before that"
            )

    def _look_at_the_disk(self) -> None:
        """Raise DiskFull if there is no room."""
        check_folder(self._folder)
        status = os.statvfs(self._folder)
        free = status.f_bavail * status.f_frsize
        if self.training.state_tier != CPU and free < self.layout.nbytes:
            raise DiskFull(
                f"weights and states take {gib(self.layout.nbytes)} of {self._folder}, where {gib(free)} is free; name another "
                "folder with --disk (disk_dir=)"
            )

    @property
    def gradient_bytes(self) -> int:
        return self.trainable.gradient_bytes(self.training.masters)

    @property
    def peak_bytes(self) -> int:
        """Bytes that gradients and states hold at most: one gradient more while it is added."""
        return self._host_bytes() + max(value.nbytes for value in self.trainable)

    def _host_bytes(self) -> int:
        """Bytes that gradients and states will hold."""
        states = self.layout.state_bytes
        if self.training.state_tier != CPU:
            states = BUFFER_COUNT * self.layout.largest_bytes
        return states + self.gradient_bytes

    def _take_gradients(
        self, blocks: dict[BlockKey, list[ParameterHome]], ties: Iterable[TiedUse], machine: Machine
    ) -> HostGradients:
        on_host = {
            key: [(home.name, home.parameter) for home in homes if home.parameter.data.device.type == "cpu"]
            for key, homes in blocks.items()
        }
        for parameter in self.trainable:
            # Those on the device stay there, and are added up in the same dtype.
            parameter.grad_dtype = gradient_dtype(parameter, self.training.masters)
        on_their_way = ring_bytes(self.gradient_bytes) if machine.discrete else 0
        self._host_ledger.charge("gradients", self.gradient_bytes + on_their_way)
        gradients = HostGradients(machine, self.training.masters)
        gradients.add(on_host, ties)
        return gradients

    def _take_states(self, reads: Link, writes: Link) -> States:
        def charge(nbytes: int) -> None:
            self._host_ledger.charge(_STATES, nbytes)

        if self.training.state_tier == CPU:
            return CpuStates(self.layout, self.weights, writes, charge, self.drop_file)
        return NvmeStates(
            self.layout, self.weights, reads, writes, charge, partial(self.new_file, self._folder), self.drop_file
        )

    def new_file(self, folder: str) -> StateFile:
        """A file for weights and states, on the filesystem of `folder`."""
        file = StateFile.new(folder, self.layout.nbytes)
        self.buffered = self.buffered or not file.direct
        self._disk_ledger.charge(_STATES, self.layout.nbytes)
        return file

    def open_file(self, path: str) -> StateFile:
        """A file for weights and states that is there already, to be read."""
        file = StateFile.open(path)
        self._disk_ledger.charge(_STATES, self.layout.nbytes)
        return file

    def drop_file(self, file: StateFile) -> None:
        """Nothing needs it any more; under names that it was given, it stays."""
        # The next file may have the same descriptor, and with it the same path.
        self._engine.forget(file.path)
        file.close()
        self._disk_ledger.release(_STATES, self.layout.nbytes)

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must remember of the optimizer; `kind` is what another one must not differ in."""
        group = self.optimizer.param_groups[0]
        return {
            "kind": {
                "optimizer": self.training.optimizer,
                "master_dtype": self.training.master_dtype,
                "sub_group_elements": self.training.sub_group_elements,
                "momentum": bool(self.training.momentum),
            },
            "group": {name: value for name, value in group.items() if name != "params"},
            "steps": self.optimizer.steps,
            "steps_of": self._steps_of,
        }

    def resume(self, file: StateFile, settings: Mapping[str, Any]) -> StateSnapshot:
        """Go on from a file of states; the weights follow."""
        with self._executor.lock, torch.no_grad():
            self._executor.settle()
            frozen = self.states.restore(file)
        self._steps_of = dict(settings["steps_of"])
        self.optimizer.steps = settings["steps"]
        self.optimizer.param_groups[0].update(settings["group"])
        self.weights.accept_changes()
        return frozen
