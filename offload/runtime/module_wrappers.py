"""Onload scopes: a module's parameters are on the device while its `forward` runs.

`forward` is wrapped on the instance, with try and finally, and not hooked: a post-hook does not run after Ctrl-C, nor
when activation checkpointing stops a recomputation early, and the slot would stay taken.
"""

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn

from offload.model.blocks import Unit
from offload.model.micro_batch import MicroBatches
from offload.model.pytree import to_device
from offload.runtime.adapted_parameters import is_wrapper, unwritten
from offload.runtime.clock import PassClock
from offload.runtime.compiled_code import CompiledLayers, Suspension, outside_of_graphs
from offload.runtime.embedding_rows import EmbeddingTable, RowwiseEmbedding
from offload.runtime.executor import LayerExecutor
from offload.runtime.hybrid_linear import HybridLinear
from offload.scheduler.model_spec import BlockRole
from offload.scheduler.plan import Plan
from offload.scheduler.trace import COMPUTE, HOST_COMPUTE
from offload.storage.blocks import BlockKey
from offload.storage.errors import SessionError, StaleSlot

Forward = Callable[..., Any]

_CPU = torch.device("cpu")


class ForwardWrap:
    """Replaces the `forward` of one module until undone.

    Args:
        make: given the module's own forward, returns the one to use instead.
    """

    def __init__(self, module: nn.Module, make: Callable[[Forward], Forward]) -> None:
        self._module = module
        self._before = module.__dict__.get("forward")
        module.forward = _Wrapped(module.forward, make, module, self._before)

    def undo(self) -> None:
        if self._before is not None:
            self._module.forward = self._before
        else:
            self._module.__dict__.pop("forward", None)


@outside_of_graphs
class _Wrapped:
    """A forward in an onload scope, which looks like the one it wraps (signature, name); a copied module has the plain one."""

    def __init__(
        self, original: Forward, make: Callable[[Forward], Forward], module: nn.Module, on_instance: Forward | None
    ) -> None:
        functools.update_wrapper(self, original)
        self._call = make(original)
        self._module = module
        self._on_instance = on_instance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with Suspension():
            return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        # With this one, the copy would compute with the original's slots. Its weights are copies of the values.
        if self._on_instance is not None:
            return copy.deepcopy(self._on_instance, memo)
        copied = memo[id(self._module)]
        return MethodType(type(copied).forward, copied)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise SessionError("an offloaded model cannot be pickled. Use save_pretrained, or leave the context first.")


class OnloadedModule:
    """The onload scope of one unit: open while its module computes."""

    trains = False
    """Backward passes through it."""

    def __init__(
        self, unit: Unit, executor: LayerExecutor, clock: PassClock, tables: Mapping[BlockKey, EmbeddingTable]
    ) -> None:
        self._unit = unit
        self._executor = executor
        self._clock = clock
        self._tables = tables

    def wrap(self, forward: Forward) -> Forward:
        def windowed(*args: Any, **kwargs: Any) -> Any:
            with self._executor.lock:
                self._prepare()
                table = self._tables.get(self._unit.uses[0]) if self._unit.fetches_rows else None
                if table is not None:
                    return self._fetch_rows(table, forward, args, kwargs)
                return self._run(forward, args, kwargs)

        return windowed

    def _prepare(self) -> None:
        """The unit is about to compute."""

    def _fetch_rows(self, table: EmbeddingTable, forward: Forward, args: Any, kwargs: Any) -> Any:
        table.waited_seconds = 0.0
        self._clock.enter(COMPUTE, self._unit.key)
        begun = time.perf_counter()
        try:
            with RowwiseEmbedding(table, self._executor.device, self.trains):
                return forward(*args, **kwargs)
        finally:
            if table.waited_seconds:
                self._clock.charge_wait("disk", begun, begun + table.waited_seconds)
            self._clock.leave()

    def _run(self, forward: Forward, args: Any, kwargs: Any) -> Any:
        self._executor.open(self._unit.uses)
        self._clock.enter(COMPUTE, self._unit.key)
        try:
            return self._own(self._compute(forward, args, kwargs))
        finally:
            self._clock.leave()
            self._executor.close(self._unit.uses)

    def _compute(self, forward: Forward, args: Any, kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            return forward(*args, **kwargs)

    def _own(self, output: Any) -> Any:
        """What a module returns must not lie in its slot, which is about to hold other values."""
        if isinstance(output, torch.Tensor):
            return output.clone() if self._executor.in_slots(output) else output
        if type(output) in (tuple, list):
            return type(output)(self._own(item) for item in output)
        return output

    def _pack(self, tensor: torch.Tensor) -> Any:
        if self._executor.in_slots(tensor):
            return _InSlot(self._unit.key, self._executor.generation_at(tensor))
        return tensor


class CpuModule:
    """The scope of a unit that the CPU computes, from its home in CPU memory: what it works on crosses the link instead.

    Its part of a KV cache stays in CPU memory, since it is made there.
    """

    def __init__(self, unit: Unit, executor: LayerExecutor, clock: PassClock) -> None:
        self._unit = unit
        self._executor = executor
        self._clock = clock

    def wrap(self, forward: Forward) -> Forward:
        def windowed(*args: Any, **kwargs: Any) -> Any:
            with self._executor.lock:
                self._clock.enter(HOST_COMPUTE, self._unit.key)
                try:
                    output = forward(*to_device(args, _CPU), **to_device(kwargs, _CPU))
                    return to_device(output, self._executor.device)
                finally:
                    self._clock.leave()

        return windowed


class AroundParts:
    """The call of a block whose sub-modules are onloaded: what it computes around them is noted as its own."""

    def __init__(self, key: BlockKey, clock: PassClock) -> None:
        self._key = key
        self._clock = clock

    def wrap(self, forward: Forward) -> Forward:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self._clock.enter(COMPUTE, self._key)
            try:
                return forward(*args, **kwargs)
            finally:
                self._clock.leave()

        return noted


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


class ModuleWrappers:
    """Wraps all units of a model, until undone.

    Args:
        around: the modules whose sub-modules are units.
        plan: says what the CPU computes, and how many sequences a layer computes at once.
        divided: products that the device and the CPU share, by block.
        on_device: makes the wrapper of a unit that the device computes.
        compiled: runs what the user compiled; says what is slower than planned, and why.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        around: Mapping[BlockKey, nn.Module],
        plan: Plan,
        cpu_gpu_split: Mapping[BlockKey, Sequence[HybridLinear]],
        on_device: Callable[[Unit], OnloadedModule],
        executor: LayerExecutor,
        clock: PassClock,
        compiled: CompiledLayers,
    ) -> None:
        self._wraps = [ForwardWrap(module, compiled.leave_out) for module in around.values()]
        self._wraps += [ForwardWrap(module, AroundParts(key, clock).wrap) for key, module in around.items()]
        on_host = frozenset(plan.weights.computed_on_host)
        parts = (
            MicroBatches(plan.splits.micro_batch, plan.splits.decode_micro_batch, compiled.warn)
            if plan.splits.micro_batch
            else None
        )
        for unit in units:
            wrappers = [module for module in unit.module.modules() if is_wrapper(module)]
            self._wraps += [ForwardWrap(wrapper, unwritten(wrapper)) for wrapper in wrappers]
            for product in cpu_gpu_split.get(unit.key, ()):
                self._wraps.append(ForwardWrap(product.module, product.wrap))
            if unit.role is BlockRole.LAYER and not any(unit.key.startswith(f"{key}.") for key in around):
                self._wraps.append(ForwardWrap(unit.module, compiled.wrap))
            if parts is not None and unit.role is BlockRole.LAYER:
                self._wraps.append(ForwardWrap(unit.module, parts.wrap))
            wrapper = on_device(unit) if on_host.isdisjoint(unit.uses) else CpuModule(unit, executor, clock)
            self._wraps.append(ForwardWrap(unit.module, wrapper.wrap))

    def undo(self) -> None:
        while self._wraps:
            self._wraps.pop().undo()
