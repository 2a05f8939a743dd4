"""Backward through blocks that are streamed: each is brought again, computed again, and differentiated while it is there.

Nothing of a block's forward is kept but its inputs. When backward asks for the first tensor that the forward would have
saved, the block is loaded, its forward runs once more, and what that saves is handed out; the block stays in its slots
until backward asks for another one's. This is recomputation without re-entrance (torch's checkpoint does the same), so
that whatever leaves a block by other ways than its result (router logits, hooks) keeps its gradient. torch's own cannot be
used: it lets go of the weights when the recomputation ends, and the slot would hold others by the time of their use.
"""

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Cache

from offload.model.caches import is_known, snapshot
from offload.model.pytree import leaves, tensors
from offload.runtime.clock import PassClock
from offload.runtime.executor import LayerExecutor
from offload.runtime.rng_state import AutocastState, RngState
from offload.scheduler.trace import COMPUTE
from offload.storage.blocks import BlockKey
from offload.storage.errors import SessionError, StaleSlot
from offload.training.backward.activation_offload import ActivationStore, OffloadedTensor

Forward = Callable[..., Any]


class Backward:
    """The block that backward is in; at most one is held.

    Args:
        executor: brings the blocks.
        clock: told whose time it is.
        began, ended: called when a backward pass begins, and when it is over.
    """

    def __init__(self, executor: LayerExecutor, clock: PassClock, began: Callable[[], None], ended: Callable[[], None]) -> None:
        self._executor = executor
        self._clock = clock
        self._began = began
        self._ended = ended
        self._held: Held | None = None
        self._frames: deque[weakref.ref[Held]] = deque()
        """In the order of forward."""
        self.recomputing = False

    def begin(self) -> None:
        """Several backward passes count as one, until `end`."""
        self._clock.begin_backward()
        self._began()

    def begin_within(self) -> None:
        """As `begin`, called by what backward runs: the end comes by itself. Nothing if it has begun."""
        with self._executor.lock:
            if self._clock.begin_backward():
                torch.autograd.Variable._execution_engine.queue_callback(self.end)
                self._began()

    def register(self, frame: "Held") -> None:
        """A block was computed; backward will come to it."""
        while self._frames and self._frames[-1]() is None:
            # Of a forward that no backward followed.
            self._frames.pop()
        self._frames.append(weakref.ref(frame))

    def _fetch_next(self, frame: "Held") -> None:
        """What the next block was given: that of the last one in forward that backward was not at yet."""
        while self._frames and (last := self._frames.pop()()) is not frame:
            if last is not None:
                self._frames.append(weakref.ref(last))
                break
        following = next((found for item in reversed(self._frames) if (found := item()) is not None), None)
        if following is not None:
            following.prefetch()

    def onload(self, frame: "Held") -> None:
        """Have the frame's block in its slots, and the tensors that its forward saves."""
        if frame is self._held:
            return
        self.release()
        self.begin_within()
        self._executor.open(frame.uses)
        # Held from here on: whatever goes wrong, the block is given back.
        self._held = frame
        self._clock.enter(COMPUTE, frame.key)
        self.recomputing = True
        try:
            frame.recompute(self._generation)
        finally:
            self.recomputing = False
        self._fetch_next(frame)

    def release(self) -> None:
        """Backward is through with the block that is held."""
        if self._held is not None:
            frame, self._held = self._held, None
            # All since it came was the block's.
            self._clock.leave()
            frame.forget()
            self._executor.close(frame.uses)

    def end(self) -> None:
        """Backward is over, or was given up."""
        with self._executor.lock:
            self.release()
            if self._clock.end_backward():
                self._ended()

    @property
    def lock(self) -> Any:
        return self._executor.lock

    @property
    def device(self) -> torch.device:
        return self._executor.device

    def in_slots(self, tensor: torch.Tensor) -> bool:
        return self._executor.in_slots(tensor)

    def _generation(self, tensor: torch.Tensor) -> int | None:
        """The generation of the slot that a tensor lies in; None if it lies in none."""
        return self._executor.generation_at(tensor) if self._executor.in_slots(tensor) else None


class Held(Protocol):
    """One call of a block, as backward needs it."""

    key: BlockKey
    uses: tuple[BlockKey, ...]

    def recompute(self, generation_of: Callable[[torch.Tensor], int | None]) -> None:
        """Its weights are there: have what its forward saves."""

    def forget(self) -> None:
        """Its weights are about to go."""

    def prefetch(self) -> None:
        """It is next."""


class RecomputeFrame:
    """One call of a block, to be computed again.

    Args:
        key, uses: of the unit, and of the blocks that hold its weights.
        module: whose parameters must be as they were.
        forward: of the unit, without its onload scope.
    """

    def __init__(
        self,
        backward: Backward,
        key: BlockKey,
        uses: tuple[BlockKey, ...],
        module: nn.Module,
        forward: Forward,
        args: Any,
        kwargs: Any,
    ) -> None:
        self.key, self.uses = key, uses
        self._backward = backward
        self._module = module
        self._forward = forward
        self._args, self._kwargs = _before_growth(args), _before_growth(kwargs)
        self._versions = self._seen_versions()
        self._randomness, self._autocasts = RngState(backward.device), AutocastState(backward.device)
        self._count = 0
        self._tensors: list[tuple[torch.Tensor, int | None]] = []

    def pack(self, tensor: torch.Tensor) -> int:
        """Instead of the tensor, its place among those that the forward saves."""
        self._count += 1
        return self._count - 1

    def unpack(self, place: int) -> torch.Tensor:
        with self._backward.lock:
            self._backward.onload(self)
            tensor, generation = self._tensors[place]
            if generation is not None and self._backward._generation(tensor) != generation:
                raise StaleSlot(f"backward needs a weight of {self.key} whose slot holds another block by now")
            return tensor

    def recompute(self, generation_of: Callable[[torch.Tensor], int | None]) -> None:
        self._check_unchanged()
        saved: list[tuple[torch.Tensor, int | None]] = []

        def collect(tensor: torch.Tensor) -> None:
            saved.append((tensor.detach(), generation_of(tensor)))

        args, kwargs = _onloaded((self._args, self._kwargs))
        with (
            torch.enable_grad(),
            self._randomness.replay(),
            self._autocasts.replay(),
            torch.autograd.graph.saved_tensors_hooks(collect, _never),
        ):
            self._forward(*args, **kwargs)
        if len(saved) != self._count:
            raise SessionError(
                f"{self.key} saved {self._count} tensors for backward, and {len(saved)} when it was computed again: its "
                "forward depends on something that changed in between"
            )
        self._tensors = saved

    def _check_unchanged(self) -> None:
        if self._seen_versions() != self._versions:
            raise SessionError(
                f"a parameter or an input of {self.key} was changed between forward and backward, which would give wrong "
                "gradients; step the optimizer after backward, and write to no tensor that a layer was given"
            )

    def _seen_versions(self) -> dict[int, int]:
        """The versions of what the block computes with; parameters may change places in their module."""
        return {id(value): value._version for value in (*self._module.parameters(), *tensors((self._args, self._kwargs)))}

    def forget(self) -> None:
        self._tensors = []

    def offload(self, store: ActivationStore) -> None:
        """What the block was given waits in the store. It was computed already."""
        self._check_unchanged()
        self._args, self._kwargs = _offload((self._args, self._kwargs), store)
        self._versions = self._seen_versions()

    def prefetch(self) -> None:
        """It will be needed soon."""
        for item in leaves((self._args, self._kwargs)):
            if isinstance(item, _Offloaded):
                item.kept.prefetch()


@dataclass(frozen=True, slots=True)
class _Offloaded:
    """Instead of a tensor among the arguments."""

    kept: OffloadedTensor
    requires_grad: bool


def _offload(value: Any, store: ActivationStore) -> Any:
    if store.takes(value):
        return _Offloaded(store.keep(value), value.requires_grad)
    if type(value) in (tuple, list):
        return type(value)(_offload(item, store) for item in value)
    if type(value) is dict:
        return {name: _offload(item, store) for name, item in value.items()}
    return value


def _onloaded(value: Any) -> Any:
    if isinstance(value, _Offloaded):
        return value.kept.tensor().detach().requires_grad_(value.requires_grad)
    if type(value) in (tuple, list):
        return type(value)(_onloaded(item) for item in value)
    if type(value) is dict:
        return {name: _onloaded(item) for name, item in value.items()}
    return value


def _never(packed: Any) -> torch.Tensor:
    raise AssertionError("nothing is differentiated while a block is computed again")


def _before_growth(value: Any) -> Any:
    """The arguments, with caches as they are now: the forward will add to them, and so would the second one."""
    if isinstance(value, Cache):
        if not is_known(value):
            raise SessionError(f"a {type(value).__name__} cannot be used in training; call the model with use_cache=False")
        return snapshot(value)
    if type(value) in (tuple, list):
        return type(value)(_before_growth(item) for item in value)
    if type(value) is dict:
        return {name: _before_growth(item) for name, item in value.items()}
    return value
