"""Windows: a module's parameters are on the device while its `forward` runs.

`forward` is wrapped on the instance, with try and finally, and not hooked: a post-hook does not run after Ctrl-C, nor
when activation checkpointing stops a recomputation early, and the slot would stay taken.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from offload.model.blocks import Unit
from offload.runtime.clock import PassClock
from offload.runtime.executor import LayerExecutor
from offload.runtime.weights import GatheredTable
from storage.errors import SessionError, StaleSlot

Forward = Callable[..., Any]


class ForwardWrap:
    """Replaces the `forward` of one module until undone.

    Args:
        make: given the module's own forward, returns the one to use instead.
    """

    def __init__(self, module: nn.Module, make: Callable[[Forward], Forward]) -> None:
        self._module = module
        self._before = module.__dict__.get("forward")
        original = module.forward
        wrapped = functools.wraps(original)(make(original))
        wrapped._torchdynamo_disable = True  # type: ignore[attr-defined]
        module.forward = wrapped  # type: ignore[method-assign]

    def undo(self) -> None:
        if self._before is not None:
            self._module.forward = self._before
        else:
            self._module.__dict__.pop("forward", None)


class UnitWindow:
    """The window of one unit: open while its module computes."""

    def __init__(self, unit: Unit, executor: LayerExecutor, clock: PassClock, table: GatheredTable | None) -> None:
        self._unit = unit
        self._executor = executor
        self._clock = clock
        self._table = table
        self._depth = 0

    def wrap(self, forward: Forward) -> Forward:
        def windowed(*args: Any, **kwargs: Any) -> Any:
            with self._executor.lock:
                if self._table is not None:
                    with _RowFetching(self._table):
                        return forward(*args, **kwargs)
                return self._run(forward, args, kwargs)

        return windowed

    def _run(self, forward: Forward, args: Any, kwargs: Any) -> Any:
        self._executor.open(self._unit.uses)
        self._depth += 1
        begun = time.perf_counter()
        try:
            if torch.is_grad_enabled():
                with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                    output = forward(*args, **kwargs)
            else:
                output = forward(*args, **kwargs)
            return self._own(output)
        finally:
            self._depth -= 1
            if not self._depth:
                self._clock.charge_compute(time.perf_counter() - begun)
            self._executor.close(self._unit.uses)

    def _own(self, output: Any) -> Any:
        """What a window returns must not lie in its slot, which is about to hold other values."""
        if isinstance(output, torch.Tensor):
            return output.clone() if self._executor.in_slots(output) else output
        if type(output) in (tuple, list):
            return type(output)(self._own(item) for item in output)
        return output

    def _pack(self, tensor: torch.Tensor) -> Any:
        if self._executor.in_slots(tensor):
            return _InSlot(self._unit.key, self._executor.generation_at(tensor))
        return tensor


class _InSlot:
    """What autograd keeps instead of a tensor in a slot."""

    def __init__(self, key: str, generation: int) -> None:
        self.key, self.generation = key, generation


def _unpack(saved: Any) -> torch.Tensor:
    if isinstance(saved, _InSlot):
        raise StaleSlot(
            f"backward needs weights of {saved.key}, which passed through a slot (generation {saved.generation}) that holds "
            "others by now: this session streams weights for the forward pass only. Run the model under torch.no_grad(), "
            "or train it outside of the context."
        )
    assert isinstance(saved, torch.Tensor)
    return saved


class _RowFetching(TorchFunctionMode):
    """While an embedding's forward runs, its look-ups are answered by the rows themselves."""

    def __init__(self, table: GatheredTable) -> None:
        super().__init__()
        self._table = table

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.embedding:
            weight, indices = args[0], args[1]
            if weight is self._table.homes[0].parameter:
                if torch.is_grad_enabled() and weight.requires_grad:
                    return _NoBackward.apply(weight, self._table, indices)
                return self._table.rows(indices)
        return function(*args, **(kwargs or {}))


class _NoBackward(torch.autograd.Function):
    """Rows that a backward pass stops at, instead of silently giving the table no gradient."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, table: GatheredTable, indices: torch.Tensor) -> torch.Tensor:
        ctx.key = table.key
        return table.rows(indices)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise StaleSlot(
            f"backward reaches {ctx.key}, of which only single rows were read: this session streams weights for the "
            "forward pass only. Run the model under torch.no_grad(), or train it outside of the context."
        )


def refuse(what: str, instead: str) -> Forward:
    """A method that raises: `what` cannot be done to an offloaded model."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise SessionError(f"{what} is not possible while the model is offloaded. {instead}")

    return refused
