"""The onload scope of a unit while a model is trained."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from offload.model.blocks import Unit
from offload.runtime.clock import PassClock
from offload.runtime.embedding_rows import EmbeddingTable
from offload.runtime.executor import LayerExecutor
from offload.runtime.module_wrappers import Forward, OnloadedModule
from offload.scheduler.model_spec import BlockRole
from offload.storage.blocks import BlockKey
from offload.training.backward.activation_offload import ActivationStore
from offload.training.backward.recompute import Backward, RecomputeFrame
from offload.training.backward.saved_tensors import SavedFrame
from offload.training.options import GPU


class TrainedModule(OnloadedModule):
    """Keeps nothing of a layer's forward but its inputs; backward computes it again.

    What stays on the device and is no layer is differentiated as ever.

    Args:
        activation_tier: where what backward needs waits; `gpu` keeps all of it on the device.
        store: where the inputs wait; None for the device.
        ensure: returns when the blocks have their present values.
    """

    trains = True

    def __init__(
        self,
        unit: Unit,
        executor: LayerExecutor,
        clock: PassClock,
        tables: Mapping[BlockKey, EmbeddingTable],
        backward: Backward,
        activation_tier: str,
        store: ActivationStore | None,
        ensure: Callable[[Sequence[BlockKey]], None],
    ) -> None:
        super().__init__(unit, executor, clock, tables)
        self._backward = backward
        self._keeps_all = activation_tier == GPU
        self._store = store
        self._ensure = ensure

    def _prepare(self) -> None:
        self._ensure(self._unit.uses)

    def _compute(self, forward: Forward, args: Any, kwargs: Any) -> Any:
        streamed = any(key in self._executor.blocks for key in self._unit.uses)
        framed = streamed or (self._unit.role is BlockRole.LAYER and not self._keeps_all)
        if not torch.is_grad_enabled() or self._backward.recomputing or not framed:
            return forward(*args, **kwargs)
        if self._keeps_all:
            return self._saving(forward, args, kwargs)
        frame = RecomputeFrame(self._backward, self._unit.key, self._unit.uses, self._unit.module, forward, args, kwargs)
        self._backward.register(frame)
        with torch.autograd.graph.saved_tensors_hooks(frame.pack, frame.unpack):
            output = forward(*args, **kwargs)
        if self._store is not None:
            frame.offload(self._store)
        return output

    def _saving(self, forward: Forward, args: Any, kwargs: Any) -> Any:
        blocks = self._executor.blocks
        homes = [home for key in self._unit.uses if key in blocks for home in blocks[key].homes]
        frame = SavedFrame(self._backward, self._unit.key, self._unit.uses, homes, self._unit.module)
        with torch.autograd.graph.saved_tensors_hooks(frame.pack, frame.unpack):
            return forward(*args, **kwargs)
