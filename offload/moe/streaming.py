"""Experts while they compute: which are needed is known when the router has spoken; they are loaded, used, and cached."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from offload.model.experts import ExpertsUnit
from offload.model.homes import ParameterHome
from offload.model.placeholders import was_written_to
from offload.moe.forward import ExpertForward
from offload.moe.router_prediction import Accuracy, RouterPrediction, RouterPredictor
from offload.moe.slot_tensor import SlottedModule, SlotTensor
from offload.moe.slots import ExpertSlots, HomeExperts
from offload.runtime.executor import LayerExecutor
from offload.runtime.machine import Machine
from offload.scheduler.expert_cache import ExpertCache
from offload.scheduler.expert_cost import MissRule, asks_for_nearly_all
from offload.storage.errors import SessionError


@dataclass(slots=True)
class LayerTally:
    """What became of the experts that one layer asked for; each counts once a pass.

    Attributes:
        choices: experts asked for.
        hits: of them, those that were in a slot, or on their way there.
        copies: brought.
        copied_bytes: theirs.
        computed_on_cpu: computed where they were.
    """

    choices: int = 0
    hits: int = 0
    copies: int = 0
    copied_bytes: int = 0
    computed_on_cpu: int = 0


@dataclass(slots=True)
class ExpertTally:
    """What became of a session's experts.

    Attributes:
        prefetches: experts that were brought because they were predicted.
        prefetches_used: of them, those that were asked for then.
        accuracy: of the predictions.
    """

    layers: list[LayerTally]
    prefetches: int = 0
    prefetches_used: int = 0
    accuracy: Accuracy = field(default_factory=Accuracy)

    def add(self, layer: int, needed: int, hits: int, elsewhere: int, expert_bytes: int) -> None:
        """One pass through one layer."""
        tally = self.layers[layer]
        tally.choices += needed
        tally.hits += hits
        tally.copies += needed - hits - elsewhere
        tally.copied_bytes += (needed - hits - elsewhere) * expert_bytes
        tally.computed_on_cpu += elsewhere


@dataclass(slots=True)
class RoutedRows:
    """One pass through one layer."""

    layer: int
    phase: str
    choices: Any
    weights: Any
    resident: frozenset[int] = field(default_factory=frozenset)


@dataclass(frozen=True, slots=True)
class StreamedLayer:
    """The experts of one layer, and the homes of their parameters in the order of the layout."""

    unit: ExpertsUnit
    homes: Sequence[ParameterHome]


@dataclass(frozen=True, slots=True)
class Observers:
    """What is told of every pass through a layer.

    Attributes:
        tally: added to.
        note: called with what was routed.
    """

    tally: ExpertTally
    note: Callable[[RoutedRows], None]


@dataclass(frozen=True, slots=True)
class Prefetching:
    """What is loaded before it is asked for.

    Attributes:
        predictor: of what the next layer will ask for in decode; None to load nothing ahead.
        prompts: load experts of the next layer while a long prompt is computed.
    """

    predictor: RouterPredictor | None
    prompts: bool


class ExpertStreaming:
    """The experts of a model, whatever layer they are in.

    Args:
        cache: decides.
        store: does.
        rule: which experts the CPU computes.
    """

    def __init__(
        self,
        machine: Machine,
        executor: LayerExecutor,
        layers: Sequence[StreamedLayer],
        cache: ExpertCache,
        store: ExpertSlots,
        rule: MissRule,
        observers: Observers,
        prefetching: Prefetching,
    ) -> None:
        self.cache = cache
        self.store = store
        self._tally, self._note = observers.tally, observers.note
        self._device = machine.device
        self._executor = executor
        self._clock = machine.clock
        self._units = [layer.unit for layer in layers]
        self._homes = [list(layer.homes) for layer in layers]
        self._rule = rule
        self._predictor = prefetching.predictor
        self._prompts_ahead = prefetching.prompts
        self._predicted: RouterPrediction | None = None
        self._ahead: dict[int, int] = {}
        """Slots of experts that were brought because they were predicted, by expert."""
        self._changes: dict[int, Any] = {}
        """What was seen last of parameters that the user changed."""

    def compute(
        self, layer: int, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """What the module of a layer's experts computes; arguments and result are those of its `forward`."""
        with self._executor.lock:
            return self._run(layer, hidden_states, top_k_index, top_k_weights)

    def settle(self) -> None:
        """Nothing is on its way afterwards."""
        for layer, expert in (self.cache.holder(slot) for slot in self.store.settle()):
            # A lane holds no expert.
            if expert >= 0:
                self.cache.drop(layer, expert)

    def _run(self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self._see_changes(layer)
        # Both by one wait: a whole number is exact as a float64.
        both = torch.cat([value.detach().to(torch.float64).reshape(-1) for value in (index, weights)]).cpu().numpy()
        choices = both[: index.numel()].astype(numpy.int64).reshape(index.shape)
        shares = both[index.numel() :].reshape(weights.shape)
        self.cache.policy.note(layer, choices, shares)
        scans = asks_for_nearly_all(len(choices), self._units[layer].count, choices.shape[1])
        self.cache.scan(layer if scans else None)
        uniques, first, counts = numpy.unique(choices, return_index=True, return_counts=True)
        needed: list[int] = uniques[numpy.argsort(first)].tolist()
        unit = self._units[layer]
        self._check_prediction(layer, needed)
        rows = dict(zip(uniques.tolist(), counts.tolist(), strict=True))
        call = ExpertForward(layer, unit, self.cache, self.store, needed, rows, self._wait, self._rule)
        try:
            call.begin()
            self._tally.add(layer, len(needed), len(call.hits), len(call.computed_elsewhere), unit.nbytes)
            self._note(RoutedRows(layer, self._clock.phase, choices, shares, call.hits))
            self._look_ahead(layer, scans)
            # The model's own code, on weights that lie in slots.
            output: torch.Tensor = type(unit.module).forward(self._slotted(unit, call, hidden.device), hidden, index, weights)
        except BaseException:
            call.end()
            self._start_over(layer)
            raise
        call.end()
        return output

    def _check_prediction(self, layer: int, needed: Sequence[int]) -> None:
        """What was brought in vain and is still on its way makes room for what is needed."""
        prediction, ahead = self._predicted, self._ahead
        self._predicted, self._ahead = None, {}
        if prediction is not None and prediction.layer == layer:
            self._tally.accuracy.add(prediction, needed)
        for expert, slot in ahead.items():
            here = self.cache.holder(slot) == (layer, expert)
            if here and expert in needed:
                self._tally.prefetches_used += 1
            elif here and self.store.is_coming(slot):
                self.store.cancel(slot)
                self.cache.drop(layer, expert)

    def _look_ahead(self, layer: int, scans: bool) -> None:
        """Begin to bring what the next layer will ask for, behind what this one needs.

        Where nearly all of them will be asked for, as a long prompt does, none is in vain, and the link has no pause between
        layers: whole layers, double-buffered, as far as there is room. Else the router is waited for.
        """
        self._predicted = None if self._predictor is None else self._predictor.after(layer)
        if self._predicted is not None:
            self._load_ahead(self._predicted.layer, self._predicted.experts)
        elif self._prompts_ahead and scans and layer + 1 < len(self._units):
            following = layer + 1
            count = self.cache.room(following) // 2
            ranks, here = self.cache.policy.ranks[following], self.cache.slots[following]
            missing = (expert for expert in range(self._units[following].count) if here[expert] < 0)
            self._load_ahead(following, sorted(missing, key=lambda expert: -ranks[expert])[:count])

    def _load_ahead(self, layer: int, experts: Sequence[int]) -> None:
        answer = self.cache.request(layer, experts)
        for placed in answer.loads:
            self.store.begin(layer, placed.expert, placed.slot)
        self.cache.release(placed.slot for placed in (*answer.hits, *answer.loads))
        self._ahead = {placed.expert: placed.slot for placed in answer.loads}
        self._tally.prefetches += len(answer.loads)

    def _slotted(self, unit: ExpertsUnit, call: ExpertForward, device: torch.device) -> SlottedModule:
        parameters = {}
        for tensor in unit.layout.tensors:
            shape = (unit.count, *tensor.shape)
            parameters[tensor.name] = SlotTensor.of(call, tensor.name, shape, tensor.dtype, device)
        return SlottedModule(unit.module, parameters, by_groups=bool(call.computed_elsewhere))

    def _wait(self, slots: Sequence[int]) -> None:
        self._executor.after_use()
        late = [slot for slot in slots if self.store.is_coming(slot)]
        if late:
            self._clock.pause()
            waited = self.store.wait(late)
            self._clock.resume()
            self._executor.charge_waits(waited)

    def _see_changes(self, layer: int) -> None:
        """What the user wrote to a parameter counts from now on.

        Raises:
            SessionError: if there is something else in its place.
        """
        homes, unit = self._homes[layer], self._units[layer]
        for home, tensor in zip(homes, unit.layout.tensors, strict=True):
            if unit.module._parameters.get(tensor.name) is not home.parameter:
                raise SessionError(
                    f"{home.name} was replaced or parametrised (an adapter on experts, perhaps), and its experts are brought "
                    "one by one from where they were; give expert_policy='layers' (--expert-policy layers)"
                )
            home.notice_changes()
            if was_written_to(home.tensor):
                raise SessionError(
                    f"{home.name} was written to, and stands for experts that are read from their files: what was written is "
                    "lost. Give expert_policy='layers' (--expert-policy layers), or a model that you hold, to change experts"
                )
        state = tuple((home.version, home.tensor.data_ptr()) for home in homes)
        if any(home.modified for home in homes) and self._changes.get(layer) != state:
            self._changes[layer] = state
            self._start_over(layer)
            self.store.sources[layer] = HomeExperts(self._units[layer], homes, self._device)

    def _start_over(self, layer: int) -> None:
        """Forget what the layer has in slots: it is not to be trusted, or no longer what counts."""
        self.settle()
        for expert in range(self._units[layer].count):
            self.cache.drop(layer, expert)
