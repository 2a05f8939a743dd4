"""The window of a unit while a model is trained."""

from collections.abc import Mapping
from typing import Any

import torch

from offload.model.blocks import Unit
from offload.runtime.clock import PassClock
from offload.runtime.executor import LayerExecutor
from offload.runtime.hooks import Forward, UnitWindow
from offload.runtime.weights import GatheredTable
from offload.training.recompute import Backward, Frame
from scheduler.model_spec import BlockRole
from storage.blocks import BlockKey


class TrainingWindow(UnitWindow):
    """Keeps nothing of a layer's forward but its inputs; backward computes it again. What stays on the device and is no
    layer is differentiated as ever."""

    trains = True

    def __init__(
        self,
        unit: Unit,
        executor: LayerExecutor,
        clock: PassClock,
        tables: Mapping[BlockKey, GatheredTable],
        backward: Backward,
    ) -> None:
        super().__init__(unit, executor, clock, tables)
        self._backward = backward

    def _compute(self, forward: Forward, args: Any, kwargs: Any) -> Any:
        streamed = any(key in self._executor.blocks for key in self._unit.uses)
        recomputed = streamed or self._unit.role is BlockRole.LAYER
        if not torch.is_grad_enabled() or self._backward.recomputing or not recomputed:
            return forward(*args, **kwargs)
        frame = Frame(self._backward, self._unit.key, self._unit.uses, self._unit.module, forward, args, kwargs)
        with torch.autograd.graph.saved_tensors_hooks(frame.pack, frame.unpack):
            return forward(*args, **kwargs)
