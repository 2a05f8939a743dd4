"""The optimizer's states on NVMe (ZeRO-Infinity, arXiv 2104.07857).

A sub-group is read ahead into one of a few buffers, stepped there, and written behind, into the file that the step writes:
beside the one that a checkpoint names, which is never written to.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from offload.scheduler.sub_groups import StateLayout, SubGroup
from offload.storage.blocks import BlockKey
from offload.storage.errors import SessionError
from offload.storage.host_buffer import HostBuffer
from offload.storage.staging_ring import StagingRing
from offload.storage.state_file import StateFile
from offload.storage.transfer import Link, Transfer
from offload.training.optimizer.states import StateGroup, StateSnapshot, Weights, read_weights, views

_PART_BYTES = 8 << 20

BUFFER_COUNT = 3
"""Sub-groups in memory: one being read, one being stepped, one being written."""


@dataclass(slots=True)
class _Ahead:
    buffer: HostBuffer
    transfer: Transfer | None
    fresh: bool


@dataclass(slots=True)
class _Pending:
    block: BlockKey
    last: bool
    transfer: Transfer


@dataclass(slots=True)
class NvmeStates:
    """On NVMe, with the weights that are streamed from there.

    Attributes:
        reads, writes: the links whose threads move the bytes.
        new_file: makes a file of the layout's size.
        drop_file: told of one that nothing needs any more.
    """

    layout: StateLayout
    weights: Weights
    reads: Link
    writes: Link
    charge: Callable[[int], None]
    new_file: Callable[[], StateFile]
    drop_file: Callable[[StateFile], None]
    nbytes: int = 0
    written: dict[BlockKey, StateFile] = field(default_factory=dict)
    """The file that holds a block; none before its first step: then its weights are where they came from."""
    _frozen: list[StateFile] = field(default_factory=list)
    _released: list[StateFile] = field(default_factory=list)
    """No checkpoint needs them any more; the present weights and states may still be in them."""
    _target: StateFile | None = None
    _buffers: StagingRing = field(init=False)
    _ahead: dict[SubGroup, _Ahead] = field(default_factory=dict)
    _pending: list[_Pending] = field(default_factory=list)
    _coming: deque[SubGroup] = field(default_factory=deque)
    _last_of: dict[BlockKey, SubGroup] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._last_of = {group.block: group for group in self.layout.groups}
        self.nbytes = BUFFER_COUNT * self.layout.largest_bytes
        self.charge(self.nbytes)
        self._buffers = StagingRing.of([HostBuffer(self.layout.largest_bytes) for _ in range(BUFFER_COUNT)])

    def begin(self) -> None:
        if self._target is None:
            self._target = self.new_file()
        self._coming = deque(self.layout.groups)
        self._read_ahead()

    def take(self, group: SubGroup) -> StateGroup:
        while group not in self._ahead:
            # One comes back when its write is over.
            self._start_next(self._buffers.wait_take(self.layout.largest_bytes))
        ahead = self._ahead.pop(group)
        if ahead.transfer is not None:
            ahead.transfer.wait()
        buffer = ahead.buffer
        tensors = views(buffer.tensor, group.weights, 0) | views(buffer.tensor, group.states, group.weights.nbytes)
        if ahead.fresh:
            # Nothing was written yet: states are zero, and the weights are where they came from.
            buffer.tensor[group.weights.nbytes : group.weights.nbytes + group.states.nbytes].zero_()
        working = StateGroup(group, tensors, buffer)
        if ahead.fresh or self.weights.changed(group):
            self.weights.read(group, working.targets)
        return working

    def give_back(self, working: StateGroup) -> None:
        group, buffer = working.group, working.buffer
        assert buffer is not None
        assert self._target is not None
        if group.owns_master:
            for weight, master in zip(working.tensors[""], working.targets, strict=True):
                weight.copy_(master)
        resident = self.weights.in_place(group)
        if resident is not None:
            for target, weight in zip(resident, working.tensors[""], strict=True):
                target.copy_(weight)
        parts = [
            *_parts(self._target.write, group.weights.offset, buffer.memory[: group.weights.nbytes]),
            *_parts(
                self._target.write,
                group.states.offset,
                buffer.memory[group.weights.nbytes : group.weights.nbytes + group.states.nbytes],
            ),
        ]
        nbytes = group.weights.nbytes + group.states.nbytes
        transfer = self.writes.submit(nbytes, parts, name=f"{group.block} states")
        transfer.when_over(lambda: self._buffers.give(buffer))
        self._pending.append(_Pending(group.block, self._last_of[group.block] is group, transfer))
        self._read_ahead()

    def is_there(self, group: SubGroup) -> bool:
        ahead = self._ahead.get(group)
        return ahead is not None and (ahead.transfer is None or ahead.transfer.over)

    def settle(self, block: BlockKey) -> None:
        while any(pending.block == block for pending in self._pending):
            self._settle_one()

    def end(self) -> None:
        while self._pending:
            self._settle_one()
        self._drop_unused()

    def snapshot(self, new_file: Callable[[], StateFile]) -> StateSnapshot:
        """The file that the last step wrote; the next one writes beside it."""
        if self._target is None or self.written.get(self.layout.groups[0].block) is not self._target:
            raise SessionError("nothing was trained since the last checkpoint, which is still there")
        self._frozen.append(self._target)
        file, self._target = self._target, None
        return _Written(file, self)

    def release(self, file: StateFile) -> None:
        """No checkpoint needs the file any more."""
        self._frozen.remove(file)
        self._released.append(file)
        self._drop_unused()

    def _drop_unused(self) -> None:
        used = list(self.written.values())
        for file in [file for file in self._released if file not in used]:
            self._released.remove(file)
            self.drop_file(file)

    def restore(self, file: StateFile) -> StateSnapshot:
        self._frozen.append(file)
        staging = self._buffers.wait_take(self.layout.largest_bytes)
        for group in self.layout.groups:
            read_weights(file, group, staging, self.weights)
            self.written[group.block] = file
        self._buffers.give(staging)
        for block in self.written:
            self.weights.moved(block, file)
        return _Written(file, self)

    def close(self) -> None:
        for ahead in self._ahead.values():
            if ahead.transfer is not None:
                ahead.transfer.cancel()
        for pending in self._pending:
            pending.transfer.cancel()
        for file in (*self._frozen, *self._released, self._target):
            if file is not None:
                self.drop_file(file)
        self._ahead.clear()
        self._pending.clear()
        self._buffers.close()

    def _settle_one(self) -> None:
        """The oldest write has ended; a block whose last one it was is in its new place."""
        pending = self._pending.pop(0)
        pending.transfer.wait()
        assert self._target is not None
        if not pending.last:
            return
        changed = any(self.weights.changed(group) for group in self.layout.of(pending.block))
        if changed or self.written.get(pending.block) is not self._target:
            self.written[pending.block] = self._target
            self.weights.moved(pending.block, self._target)

    def _read_ahead(self) -> None:
        while self._coming:
            buffer = self._buffers.take(self.layout.largest_bytes)
            if buffer is None:
                return
            self._start_next(buffer)

    def _start_next(self, buffer: HostBuffer) -> None:
        group = self._coming.popleft()
        self._ahead[group] = self._start(group, buffer)

    def _start(self, group: SubGroup, buffer: HostBuffer) -> _Ahead:
        source = self.written.get(group.block)
        if source is None:
            return _Ahead(buffer, None, True)
        split = group.weights.nbytes
        parts = list(_parts(source.read, group.states.offset, buffer.memory[split : split + group.states.nbytes]))
        nbytes = group.states.nbytes
        if not group.owns_master:
            parts += _parts(source.read, group.weights.offset, buffer.memory[:split])
            nbytes += split
        return _Ahead(buffer, self.reads.submit(nbytes, parts, name=f"{group.block} states"), False)


@dataclass(slots=True)
class _Written:
    file: StateFile
    states: NvmeStates
    written: bool = True

    def wait(self) -> None:
        self.file.sync()

    def release(self) -> None:
        self.states.release(self.file)


def _parts(move: Callable[[int, memoryview], None], offset: int, memory: memoryview) -> list[Callable[[], None]]:
    def part(start: int) -> Callable[[], None]:
        return lambda: move(offset + start, memory[start : start + _PART_BYTES])

    return [part(start) for start in range(0, len(memory), _PART_BYTES)]
