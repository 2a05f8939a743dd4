"""The optimizer's states in CPU memory, beside weights that are there too."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from offload.scheduler.sub_groups import MASTER, StateLayout, SubGroup
from offload.storage.blocks import BlockKey
from offload.storage.host_buffer import HostBuffer
from offload.storage.state_file import StateFile
from offload.storage.transfer import Link, Transfer
from offload.training.optimizer.states import StateGroup, StateSnapshot, Tensors, Weights, read_weights, views


class CpuStates:
    """In CPU memory, beside weights that are there too.

    Args:
        writes: the link whose threads write checkpoints.
        charge: told of the bytes that are held, before they are.
        drop_file: told of a checkpoint's file that nothing needs any more.
    """

    def __init__(
        self,
        layout: StateLayout,
        weights: Weights,
        writes: Link,
        charge: Callable[[int], None],
        drop_file: Callable[[StateFile], None],
    ) -> None:
        self.layout = layout
        self.nbytes = layout.state_bytes
        self._weights = weights
        self._writes = writes
        self._drop_file = drop_file
        charge(self.nbytes)
        self._memory: dict[SubGroup, torch.Tensor] = {}
        self._being_saved: dict[SubGroup, Transfer] = {}
        """Not to be stepped before they are written."""
        for group in layout.groups:
            self._memory[group] = self._allocate(group)
            if group.owns_master:
                self._weights.read(group, self._of(group)[MASTER])

    def begin(self) -> None:
        pass

    def take(self, group: SubGroup) -> StateGroup:
        if group in self._being_saved:
            self._being_saved.pop(group).wait()
        weights = self._weights.in_place(group)
        assert weights is not None
        working = StateGroup(group, self._of(group) | {"": weights})
        if group.owns_master and self._weights.changed(group):
            self._weights.read(group, working.targets)
        return working

    def give_back(self, working: StateGroup) -> None:
        if working.group.owns_master:
            for weight, master in zip(working.tensors[""], working.targets, strict=True):
                weight.copy_(master)

    def is_there(self, group: SubGroup) -> bool:
        return group not in self._being_saved or self._being_saved[group].over

    def settle(self, block: BlockKey) -> None:
        pass

    def end(self) -> None:
        pass

    def snapshot(self, new_file: Callable[[], StateFile]) -> StateSnapshot:
        file = new_file()
        for group in self.layout.groups:
            nbytes = group.weights.nbytes + group.states.nbytes
            self._being_saved[group] = self._writes.submit(nbytes, [partial(self._write, file, group)], name=group.block)
        return _BeingSaved(file, list(self._being_saved.values()), self._drop_file)

    def _write(self, file: StateFile, group: SubGroup) -> None:
        """In a thread of the link: nothing steps the group meanwhile."""
        weights = self._weights.in_place(group)
        assert weights is not None
        staging = HostBuffer(max(group.weights.nbytes, group.states.nbytes))
        for target, weight in zip(views(staging.tensor, group.weights, 0)[""], weights, strict=True):
            target.copy_(weight)
        file.write(group.weights.offset, staging.memory[: group.weights.nbytes])
        staging.tensor[: group.states.nbytes].copy_(self._memory[group])
        file.write(group.states.offset, staging.memory[: group.states.nbytes])

    def restore(self, file: StateFile) -> StateSnapshot:
        staging = HostBuffer(self.layout.largest_bytes)
        for group in self.layout.groups:
            file.read(group.states.offset, staging.memory[: group.states.nbytes])
            self._memory[group].copy_(staging.tensor[: group.states.nbytes])
            read_weights(file, group, staging, self._weights)
        return _BeingSaved(file, [], self._drop_file)

    def close(self) -> None:
        for transfer in self._being_saved.values():
            transfer.cancel()
        self._memory.clear()

    def _allocate(self, group: SubGroup) -> torch.Tensor:
        """Zeros where the group's weights are: adapters, and little else, live on the device with their states."""
        weights = self._weights.in_place(group)
        assert weights is not None
        if weights[0].device.type == "cpu":
            return HostBuffer(group.states.nbytes).tensor[: group.states.nbytes]
        return torch.zeros(group.states.nbytes, dtype=torch.uint8, device=weights[0].device)

    def _of(self, group: SubGroup) -> Tensors:
        return views(self._memory[group], group.states, 0)


@dataclass(slots=True)
class _BeingSaved:
    file: StateFile
    transfers: list[Transfer]
    drop_file: Callable[[StateFile], None]
    written: bool = False

    def wait(self) -> None:
        for transfer in self.transfers:
            transfer.wait()
        self.file.sync()

    def release(self) -> None:
        self.drop_file(self.file)
