"""Per-expert caching for one session: slots, sources, statistics."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from torch import nn

from offload.config import IDENTICAL, ROUNDING
from offload.model.experts import ExpertPieces, ExpertsUnit
from offload.model.placeholders import ExpertValues, Placeholders
from offload.moe.options import AUTO, CPU, LOAD, OFF, ON, ExpertOptions
from offload.moe.placement import EXPERTS, ExpertPlacement
from offload.moe.router_prediction import NextRouter, find_router
from offload.moe.routing_log import RoutingLog
from offload.moe.slots import ExpertSlots, ExpertSource
from offload.moe.streaming import ExpertStreaming, ExpertTally, LayerTally, Observers, Prefetching, StreamedLayer
from offload.moe.usage import expert_use
from offload.report.experts import ExpertUse
from offload.runtime.component import Component, LivePlan
from offload.runtime.executor import LayerExecutor
from offload.runtime.machine import Machine
from offload.runtime.module_wrappers import ForwardWrap
from offload.scheduler.expert_cache import ExpertCache
from offload.scheduler.expert_cost import ALWAYS_LOAD, UNMEASURED, MissRule, miss_rule
from offload.scheduler.expert_policies import ADMISSION, LFU, make_policy
from offload.scheduler.hardware import HardwareProfile
from offload.scheduler.model_spec import ExpertsSpec
from offload.scheduler.plan import Plan
from offload.storage.errors import ConfigError


def rule_for_misses(
    misses: str,
    may_round: bool,
    plan: Plan,
    spec: ExpertsSpec,
    units: Sequence[ExpertsUnit],
    hardware: HardwareProfile | None,
) -> MissRule:
    """Computed on the CPU is what that was asked for, or what may round and is faster so.

    Args:
        misses: one of `MISSES`.
        hardware: a profile of the machine; None if it was not measured.

    Raises:
        ConfigError: if it was asked for, and no expert is in CPU memory.
    """
    if misses == CPU and not plan.experts.in_host_memory:
        raise ConfigError(
            "expert_misses='cpu' computes experts from CPU memory, and there is no room for any; give a larger cpu_memory"
        )
    if misses == LOAD or not plan.experts.in_host_memory or (misses == AUTO and not may_round):
        return ALWAYS_LOAD
    if hardware is None:
        return UNMEASURED if misses == CPU else ALWAYS_LOAD
    dtype = units[0].layout.tensors[0].dtype
    rule = miss_rule(hardware, max(spec.expert_bytes), dtype.itemsize, str(dtype).removeprefix("torch."))
    return rule if rule.most_tokens or misses == AUTO else UNMEASURED


class ExpertComponent(Component):
    """The experts of one session's model, cached one by one.

    Args:
        spec: as the planner knows them.
        pieces: where experts lie whose parameters are placeholders, by parameter.
        rule: which experts the CPU computes where they are.
    """

    name = "experts"

    def __init__(
        self,
        machine: Machine,
        executor: LayerExecutor,
        live: LivePlan,
        spec: ExpertsSpec,
        units: Sequence[ExpertsUnit],
        pieces: Mapping[str, ExpertPieces],
        options: ExpertOptions,
        rule: MissRule,
    ) -> None:
        self.streaming: ExpertStreaming | None = None
        self.tally = ExpertTally([LayerTally() for _ in units])
        self.spec = spec
        self.units = list(units)
        self._machine, self._executor, self._live = machine, executor, live
        self._pieces = pieces
        self.misses = CPU if rule.most_tokens else LOAD
        self._rule = rule
        self.policy = options.policy
        if options.policy == AUTO:
            self.policy = ADMISSION if self.misses == CPU else LFU
        self.log = RoutingLog("", spec.counts, spec.expert_bytes)
        self._options = options
        self._predictor: NextRouter | None = None
        if self.policy == ADMISSION and self.misses == LOAD:
            machine.notes.warn(
                "every expert that is missing must be brought here, so that the policy admission keeps what lfu keeps"
            )
        self.homes = [live.placement.homes_of(unit) for unit in units]
        self._tiers = ExpertPlacement(machine, live.placement, units, pieces)
        self._sources: list[ExpertSource] = []

    @property
    def excluded(self) -> list[nn.Parameter]:
        return [value for unit in self.units for value in unit.parameters.values()]

    def open(self, model: nn.Module, stack: ExitStack) -> None:
        """Bring the experts to their tiers."""
        self.log = RoutingLog(type(model).__name__, self.spec.counts, self.spec.expert_bytes)
        if self._options.prefetch == ON:
            routers = [find_router(model, unit.key) for unit in self.units]
            self._predictor = NextRouter(routers, self._machine.notes.warn)
        stack.callback(self._tiers.close)
        self._sources = self._tiers.apply(self._live.plan)
        for unit in self.units:
            prefix = f"{unit.key}." if unit.key else ""
            values = {
                name.removeprefix(prefix): ExpertValues(self._pieces[name]) for name in unit.parameters if name in self._pieces
            }
            if values:
                stack.callback(Placeholders(unit.module, values, self._accept).keep)

    def take_slots(self, plan: Plan) -> None:
        self._machine.ledger.charge(EXPERTS, plan.expert_bytes)
        layers, experts = len(self.units), max(unit.count for unit in self.units)
        policy = make_policy(self.policy, layers, experts)
        cache = ExpertCache(layers, experts, plan.experts.slots, policy, self.minimum(plan))
        store = ExpertSlots(self._machine.device, self.units, self._sources, plan.experts.slots, plan.experts.slot_bytes)
        layers_of_experts = [StreamedLayer(unit, homes) for unit, homes in zip(self.units, self.homes, strict=True)]
        self.streaming = ExpertStreaming(
            self._machine,
            self._executor,
            layers_of_experts,
            cache,
            store,
            self._rule,
            Observers(self.tally, self.log.note),
            Prefetching(self._predictor, self._options.prefetch != OFF),
        )
        self._executor.guard(store.arena)
        if plan.experts.slots < self.spec.token_slots:
            self._machine.notes.warn(
                f"there are {plan.experts.slots} slots for experts, and one token uses {self.spec.token_slots}: most are "
                "brought again for each; a larger budget helps more than anything else"
            )

    def free_slots(self) -> None:
        if self.streaming is not None:
            self.streaming.settle()
            self.streaming = None
        self._executor.guard(None)
        self._machine.ledger.set(EXPERTS, 0)

    def minimum(self, plan: Plan) -> int:
        """Slots that a layer is sure of."""
        return min(plan.experts.slots // len(self.units), self.spec.chosen)

    @property
    def exactness(self) -> str:
        return ROUNDING if self.misses == CPU else IDENTICAL

    def usage(self) -> ExpertUse:
        """Sum up how experts were cached, loaded and predicted so far."""
        plan = self._live.plan
        method = self.policy, self.misses
        return expert_use(plan.experts, self.units, self.tally, self.log, self.minimum(plan), method)

    def attach(self, model: nn.Module, stack: ExitStack) -> None:
        if self._predictor is not None:
            self._predictor.install(stack)
        for layer, unit in enumerate(self.units):
            stack.callback(ForwardWrap(unit.module, self._wrapped(layer)).undo)

    def _wrapped(self, layer: int) -> Callable[[Callable[..., object]], Callable[..., object]]:
        def make(forward: Callable[..., object]) -> Callable[..., object]:
            # Not the forward of the module, whose class's is run; and the slots may be others by the time of the call.
            return lambda *args, **kwargs: self._current().compute(layer, *args, **kwargs)

        return make

    def _current(self) -> ExpertStreaming:
        assert self.streaming is not None
        return self.streaming

    def _accept(self, parameter: nn.Parameter) -> None:
        """Make the values of a placeholder that was filled its home, until the end and after it."""
        home = self._live.placement.home_of(parameter)
        if home is not None:
            home.settle()
