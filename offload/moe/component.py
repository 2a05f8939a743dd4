"""All of single experts, as the session holds it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from torch import nn

from offload.config import Progress
from offload.model.experts import ExpertPieces, ExpertsUnit
from offload.model.lazy_experts import ExpertPlaceholders, paths_of
from offload.moe.placement import EXPERTS, ExpertPlacement
from offload.moe.router_prediction import NextRouter, find_router
from offload.moe.routing_log import RoutingLog
from offload.moe.slots import ExpertSlots, ExpertSource
from offload.moe.streaming import ExpertStreaming, ExpertTally, LayerTally
from offload.runtime.clock import PassClock
from offload.runtime.executor import LayerExecutor
from offload.runtime.module_wrappers import ForwardWrap
from offload.runtime.placement import Placement
from offload.scheduler.expert_cache import ExpertCache
from offload.scheduler.expert_cost import ALWAYS_LOAD, UNMEASURED, MissRule, miss_rule
from offload.scheduler.expert_policies import ADMISSION, LFU, make_policy
from offload.scheduler.hardware import HardwareProfile
from offload.scheduler.model_spec import ExpertsSpec
from offload.scheduler.plan import Plan
from offload.storage.checkpoint import identity
from offload.storage.devices.base import Device
from offload.storage.errors import ConfigError
from offload.storage.ledger import MemoryLedger
from offload.storage.reader import DiskReader

AUTO, IN_LAYERS, LOAD, CPU, ON, OFF = "auto", "layers", "load", "cpu", "on", "off"
POLICIES = (AUTO, "lru", "lfu", "admission", IN_LAYERS)
MISSES = (AUTO, LOAD, CPU)
PREFETCH = (AUTO, ON, OFF)


@dataclass(frozen=True, slots=True)
class ExpertOptions:
    """What a user may ask of experts.

    Attributes:
        policy: which of them stay in device memory.
        misses: what becomes of those that are not there.
        prefetch: `auto` brings experts of the next layer ahead while a long prompt is computed, which needs them all; `on`
            asks the next layer's router a layer early in decode, too; `off` does neither.
    """

    policy: str = AUTO
    misses: str = AUTO
    prefetch: str = AUTO

    def __post_init__(self) -> None:
        for name, known in (("policy", POLICIES), ("misses", MISSES), ("prefetch", PREFETCH)):
            if getattr(self, name) not in known:
                raise ConfigError(f"expert_{name}={getattr(self, name)!r} is not known; give one of {', '.join(known)}")


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


class ExpertComponent:
    """The experts of one session's model.

    Args:
        spec: as the planner knows them.
        pieces: where experts lie whose parameters are stand-ins, by parameter.
        ledger: of the device.
        rule: which experts the CPU computes where they are.
        name: of the model.
        told: of what is otherwise than planned.
    """

    def __init__(
        self,
        device: Device,
        executor: LayerExecutor,
        clock: PassClock,
        placement: Placement,
        reader: DiskReader,
        ledger: MemoryLedger,
        spec: ExpertsSpec,
        units: Sequence[ExpertsUnit],
        pieces: Mapping[str, ExpertPieces],
        options: ExpertOptions,
        rule: MissRule,
        name: str,
        model: nn.Module,
        progress: Progress,
        warn: Callable[[str], None],
    ) -> None:
        self.streaming: ExpertStreaming | None = None
        self.tally = ExpertTally([LayerTally() for _ in units])
        self.spec = spec
        self.units = list(units)
        self._device, self._executor, self._clock, self._ledger = device, executor, clock, ledger
        self._placement, self._pieces, self._warn = placement, pieces, warn
        self.misses = CPU if rule.most_tokens else LOAD
        self._rule = rule
        self.policy = options.policy
        if options.policy == AUTO:
            self.policy = ADMISSION if self.misses == CPU else LFU
        self.log = RoutingLog(name, spec.counts, spec.expert_bytes)
        self._prompts_ahead = options.prefetch != OFF
        self._predictor: NextRouter | None = None
        if options.prefetch == ON:
            self._predictor = NextRouter([find_router(model, unit.key) for unit in units], warn)
        if self.policy == ADMISSION and self.misses == LOAD:
            warn("every expert that is missing must be brought here, so that the policy admission keeps what lfu keeps")
        self.homes = [placement.homes_of(unit) for unit in units]
        self._tiers = ExpertPlacement(placement, units, pieces, reader, device, progress)
        self._sources: list[ExpertSource] = []

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [value for unit in self.units for value in unit.parameters.values()]

    def place(self, plan: Plan, stack: ExitStack) -> None:
        """Bring the experts to their tiers."""
        stack.callback(self._tiers.close)
        self._sources = self._tiers.apply(plan)
        identities = {path: identity(path) for path in paths_of(self._pieces.values())}
        for unit in self.units:
            prefix = f"{unit.key}." if unit.key else ""
            pieces = {name.removeprefix(prefix): self._pieces[name] for name in unit.parameters if name in self._pieces}
            if pieces:
                stack.callback(ExpertPlaceholders(unit.module, pieces, identities, self._accept).keep)

    def take_slots(self, plan: Plan) -> None:
        """Empty slots, as many as the plan says."""
        self._ledger.charge(EXPERTS, plan.expert_bytes)
        layers, experts = len(self.units), max(unit.count for unit in self.units)
        policy = make_policy(self.policy, layers, experts)
        cache = ExpertCache(layers, experts, plan.experts.slots, policy, self.minimum(plan))
        store = ExpertSlots(self._device, self.units, self._sources, plan.experts.slots, plan.experts.slot_bytes)
        self.streaming = ExpertStreaming(
            self._device,
            self._executor,
            self._clock,
            self.units,
            self.homes,
            cache,
            store,
            self.tally,
            self._rule,
            self.log.note,
            self._predictor,
            self._prompts_ahead,
        )
        self._executor.guard(store.arena)
        if plan.experts.slots < self.spec.token_slots:
            self._warn(
                f"there are {plan.experts.slots} slots for experts, and one token uses {self.spec.token_slots}: most are "
                "brought again for each; a larger budget helps more than anything else"
            )

    def free_slots(self) -> None:
        """Give the slots back; whatever was on its way is over."""
        if self.streaming is not None:
            self.streaming.settle()
            self.streaming = None
        self._executor.guard(None)
        self._ledger.release(EXPERTS, self._ledger.held_bytes(EXPERTS))

    def minimum(self, plan: Plan) -> int:
        """Slots that a layer is sure of."""
        return min(plan.experts.slots // len(self.units), self.spec.chosen)

    def wrap_modules(self, stack: ExitStack) -> None:
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
        """A stand-in has values now: its home, until the end and after it."""
        home = self._placement.home_of(parameter)
        if home is not None:
            home.tensor = home.original = parameter.data
            home.accept_changes()
