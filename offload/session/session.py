"""The context manager. It owns the lifetime of everything that a session takes."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from offload.config import IDENTICAL, ROUNDING, Budgets, Progress, process_bytes, resolve_budgets
from offload.kv.component import KvComponent, new_cache
from offload.kv.options import KvOptions
from offload.kv.prefix_cache import PrefixCache
from offload.kv.prefix_store import BLOCK_TOKENS
from offload.kv.reservation import KvReservation
from offload.model.blocks import Unit, find_structure
from offload.model.experts import ExpertsUnit
from offload.model.from_pretrained import LoadingOptions
from offload.model.homes import FileMaps
from offload.model.loading import CheckpointLoader, LoadedModel, find_folder
from offload.moe.component import CPU, IN_LAYERS, ExpertComponent, ExpertOptions, rule_for_misses
from offload.moe.usage import expert_use
from offload.planning.compare import compare
from offload.planning.describe import count_activations, longest_sequence, takes_tokens
from offload.planning.fit import ExpertGranularity, FittedPlan, fit, given_plan
from offload.planning.pass_splits import PrefillChunks, check_parts
from offload.planning.predictor import PlanGoal, Predictor
from offload.probe import kept_profile, suits
from offload.report.comparison import Comparison
from offload.report.facts import Peak, phase_uses
from offload.report.live import Snapshot
from offload.report.report import Report
from offload.report.training import TrainingEstimate
from offload.runtime.buffers import DeviceBuffers
from offload.runtime.clock import PassClock
from offload.runtime.executor import LayerExecutor
from offload.runtime.interrupts import HeldInterrupts
from offload.runtime.meters import Meters
from offload.runtime.model_facade import OffloadedModelClass
from offload.runtime.module_wrappers import ForwardWrap, ModuleWrappers, OnloadedModule
from offload.runtime.passes import ModelPass
from offload.runtime.placement import Placement
from offload.runtime.recorder import Recorder, tracing_use
from offload.runtime.registration_watch import RegistrationWatch
from offload.scheduler.hardware import HardwareProfile
from offload.scheduler.model_spec import Workload
from offload.scheduler.phases import BACKWARD
from offload.scheduler.plan import Plan
from offload.scheduler.planner import make_plan
from offload.scheduler.prediction import predict
from offload.scheduler.routing import Routing
from offload.scheduler.trace import Trace
from offload.storage.block_file import make_folder
from offload.storage.devices.base import Device
from offload.storage.errors import BudgetExceeded, BudgetTooSmall, ConfigError, ProfileError, SessionError, gib
from offload.storage.host_buffer import HostBuffer
from offload.storage.io_engines.gds import choose_engine
from offload.storage.io_engines.posix import PosixEngine
from offload.storage.reader import DiskReader
from offload.storage.transfer import Link
from offload.training.component import INPUTS, TrainingComponent, fit_training
from offload.training.estimate import estimate_training
from offload.training.memory import TrainingMemory
from offload.training.options import Training

_READ_THREADS = 4
_WRITE_THREADS = 2
_DEFAULT_TOKENS = 2048

_EXCESS = 1.05
"""Times the predicted peak: more is told."""


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked of a session; `offload` tells what each means."""

    target: nn.Module | str
    device: Device
    gpu_memory: str | int | None
    cpu_memory: str | int | None
    disk_dir: str | None
    exactness: str
    batch_size: int
    max_tokens: int | None
    new_tokens: int | None
    hardware: HardwareProfile | None
    plan: Plan | None
    training: Training | None
    uses_session_optimizer: bool
    experts: ExpertOptions
    kv: KvOptions
    progress: Progress
    loading: LoadingOptions


class Session:
    """An offloaded model, from `with` to the end of its block. Made by `offload`.

    Attributes:
        model: plain transformers code works on it, `generate` and `state_dict` included.
        plan: where each block lives.
    """

    model: nn.Module
    plan: Plan

    def __init__(self, request: Request) -> None:
        self._request = request
        self._target = request.target
        self._device = request.device
        self._disk_dir = request.disk_dir
        self._progress = request.progress
        self._hardware = request.hardware or kept_profile(request.device, request.disk_dir)
        if request.hardware is not None and not suits(request.hardware, request.device):
            has = "no GPU" if request.hardware.device is None else "a GPU"
            raise ProfileError(f"the hardware profile describes a machine with {has}, and {request.device.name} computes here")
        self._stack: ExitStack | None = None
        self._fallbacks: list[str] = []
        self._inside = False
        self._training: TrainingComponent | None = None
        self._experts: ExpertComponent | None = None
        self._kv: KvComponent | None = None
        self._needs = TrainingMemory()
        self._sources: frozenset[str] = frozenset()
        self._source_key: str | None = None

    def __enter__(self) -> "Session":
        if self._stack is not None:
            raise SessionError("this session was entered already; call offload(...) again for another one")
        self._stack = ExitStack()
        loader = self._look()
        if self._request.kv.prefix_dir is not None:
            make_folder(self._request.kv.prefix_dir)
            if loader is None:
                raise ConfigError("prefix_cache needs a model by its path: what a model in memory was made of is not known")
            self._source_key = loader.key
        try:
            # Parameters, homes and slots outlive an inference mode that the user is in, and are written to after it.
            with HeldInterrupts() as interrupts, torch.inference_mode(False):
                self._progress = partial(_told_between_interrupts, interrupts, self._progress)
                self._begin(self._stack, loader)
        except BaseException:
            with HeldInterrupts():
                self._stack.close()
            raise
        self._inside = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._stack is not None
        # A pass that another thread is in the middle of is waited for.
        with HeldInterrupts(), self._executor.lock:
            self._inside = False
            self._stack.close()

    def report(self) -> Report:
        """What was moved and how fast, so far, beside what was predicted for it. Measures the disk for a moment."""
        if not hasattr(self, "_wrappers"):
            raise SessionError("there is nothing to report yet: enter the session first, `with offload(...) as session:`")
        lent = self._lent_for_measuring() if self._inside else None
        links = self._meters.link_uses(self._link, self._written, self._reader, lent)
        return Report(
            model=self._target if isinstance(self._target, str) else type(self.model).__name__,
            device=self._device.name,
            engine=self._engine.name,
            exactness=self._level,
            parameters=self._parameters,
            weight_bytes=self._weight_bytes,
            blocks={
                "resident": len(self.plan.weights.resident),
                "streamed_from_cpu_memory": len(self.plan.weights.in_host_memory),
                "streamed_from_disk": len(self.plan.weights.streamed) - len(self.plan.weights.in_host_memory),
                "row_fetched": len(self.plan.weights.row_fetched),
                "computed_on_cpu": len(self.plan.weights.computed_on_host),
                "cpu_gpu_split": len(self.plan.weights.cpu_gpu_split),
            },
            parts={
                "cpu_percent": self.plan.weights.cpu_percent,
                "micro_batch": self.plan.splits.micro_batch,
                "decode_micro_batch": self.plan.splits.decode_micro_batch,
                "prefill_chunk": self.plan.splits.prefill_chunk,
            },
            slots={"count": self.plan.weights.slot_count, "bytes": self.plan.weights.slot_bytes},
            streamed_bytes_per_pass=self.plan.weights.streamed_bytes,
            kv={
                "reserved_bytes": self.plan.kv.reserved_bytes,
                "peak_bytes": self._reserve.peak_bytes,
                **({} if self._kv is None else self._kv.usage()),
                "prefix_loaded_tokens": self._prefixes.loaded_tokens,
                "prefix_computed_tokens": self._prefixes.computed_tokens,
            },
            tiers=self._meters.tier_uses(self._process_bytes),
            links=links,
            **phase_uses(self._clock.phases),
            prediction=self._compared({name: use.bytes_per_second for name, use in links.items() if use.bytes_per_second}),
            peak=self._peak(),
            tracing=tracing_use(self._recorder.trace),
            process_bytes=self._process_bytes,
            peak_device_bytes=self._device.peak_bytes(),
            fallbacks=self._fallbacks_so_far(),
            experts=None if self._experts is None else expert_use(self._experts, self.plan),
        )

    def kv_cache(self, prefix: Sequence[int] | torch.Tensor = (), batch_size: int = 1) -> Any:
        """A new cache for `model.generate(past_key_values=...)`, or for calls of the model: kept as the session was asked to.

        Where all keys and values stay on the device it is transformers' own.

        Args:
            prefix: token ids that prompts begin with: computed now, or loaded from `prefix_cache`, whose whole blocks are used
                only. `get_seq_length()` of the cache tells how many it holds; a prompt must have more.
            batch_size: sequences that begin so.

        Raises:
            SessionError: outside of the context.
        """
        if not self._inside:
            raise SessionError("a KV cache lives in a session: enter it first, `with offload(...) as session:`")
        if isinstance(prefix, str) or (isinstance(prefix, torch.Tensor) and prefix.dim() > 1 and len(prefix) != 1):
            raise ConfigError("prefix= is the token ids of one beginning, such as tokenizer(text)['input_ids']")
        if isinstance(prefix, torch.Tensor):
            prefix = prefix.flatten().tolist()
        cache = new_cache(self.model) if self._kv is None else self._kv.new_cache(self.model)
        return self._prefixes.prefill(cache, prefix, batch_size) if len(prefix) else cache

    @property
    def caches_prefixes(self) -> bool:
        """A prompt's beginning may be on disk, or is to be: `kv_cache(prefix=...)` is worth its while for one prompt too."""
        return self._request.kv.prefix_dir is not None

    @property
    def shares_prefixes(self) -> bool:
        """What all sequences of a batch begin with is kept and read once."""
        return self.plan.kv.segments and self._request.kv.shared_tokens > 0

    @property
    def _level(self) -> str:
        if self._request.kv.is_lossy:
            return self._request.kv.level
        begun = self._prefixes.loaded_tokens + self._prefixes.computed_tokens
        return ROUNDING if self.plan.rounds or begun or self._chunks_loss or self._splits_experts else IDENTICAL

    @property
    def _splits_experts(self) -> bool:
        return self._experts is not None and self._experts.misses == CPU

    @property
    def _chunks_loss(self) -> bool:
        return self._request.training is not None and self._request.training.loss_chunk > 0

    def snapshot(self) -> Snapshot:
        """Where it stands: cheap, and from any thread while the model runs. What it takes to measure is in `report`."""
        self._meters.collect()
        return Snapshot(
            phase=self._clock.phase,
            tiers=self._meters.tier_uses(self._process_bytes),
            links=self._meters.link_sums(self._link, self._written),
            phases=phase_uses(dict(self._clock.phases)),
        )

    def routing(self) -> Routing:
        """Which experts each token chose so far, layer by layer: empty unless single experts are brought."""
        if self._experts is None:
            return Routing("", 0, 0, ())
        if not self._experts.log.is_whole:
            self._warn("the run was too long to keep which experts all of its tokens chose: the later ones are left out")
        return self._experts.log.routing()

    def trace(self) -> Trace:
        """When each resource was busy, so far: spans and memory over time. Sums are in `report`."""
        self._meters.collect()
        return self._recorder.trace

    def _compared(self, given: dict[str, float]) -> Comparison | None:
        """Prediction beside measurement, for what was asked of the model so far; None without a hardware profile.

        Args:
            given: bytes a second that the links gave.
        """
        if self._predictor is None or self._clock.phases[BACKWARD].passes:
            return None
        return compare(self._predictor, self.plan, self._spec, self._clock.phases, self._goal(), given)

    def _lent_for_measuring(self) -> memoryview | None:
        """What the disk is measured into must not pass a budget."""
        lent = self._executor.lend(self._reader.probe_bytes)
        if lent is None and not self._device.shares_host_memory:
            free = self._meters.host_ledger.free_bytes
            lent = HostBuffer(self._reader.probe_bytes).memory if free is None or free >= self._reader.probe_bytes else None
        return lent

    def _fallbacks_so_far(self) -> list[str]:
        whole = [
            f"{table.key} is used otherwise than by looking rows up, so it is read as a whole each time"
            for table in self._placement.tables.values()
            if table.was_read_whole
        ]
        training = () if self._training is None else self._training.fallbacks
        said = (*self._fallbacks, *whole, *training, *self._placement.fallbacks, *self._engine.fallbacks, *self._excess())
        return list(dict.fromkeys(said))

    def _excess(self) -> list[str]:
        peak = self._peak()
        if (peak.measured_bytes or 0) <= _EXCESS * peak.predicted_bytes:
            return []
        more = gib((peak.measured_bytes or 0) - peak.predicted_bytes)
        return [
            f"{more} more memory was held than predicted: what kernels keep for themselves (experts' products on a CPU "
            "above all) and what backward holds of a layer is not in the budget; give a smaller one if memory is short"
        ]

    def _peak(self) -> Peak:
        extra_bytes = 0
        if self._device.shares_host_memory:
            extra_bytes = self._needs.activation_bytes + (0 if self._training is None else self._training.host_bytes)
        return self._meters.peak(self.plan, self._process_bytes - self._held_bytes, extra_bytes)

    def _look(self) -> CheckpointLoader | None:
        """The checkpoint, downloaded if need be; None for a model that the user holds."""
        self._process_bytes = process_bytes()
        if isinstance(self._target, nn.Module):
            return None
        options = self._request.loading
        return CheckpointLoader(find_folder(self._target, options), options)

    def _begin(self, stack: ExitStack, loader: CheckpointLoader | None) -> None:
        loaded = self._load(stack, loader)
        self.model = loaded.model
        self._fallbacks += loaded.fallbacks
        if not takes_tokens(self.model):
            self._fallbacks.append("the model takes no tokens: its temporaries are not known beforehand and not in the budget")
        self._open_storage(stack, loaded)
        fitted = self._fit(ExpertGranularity.PER_EXPERT if loaded.experts else self._experts_wanted())
        if takes_tokens(self.model) and self._activations is None:
            self._fallbacks.append("the model's code does not run without values: its temporaries are estimated")
        self._take(fitted)
        self._make_predictor(fitted)
        self._choose_plan()
        self._offloaded_class(stack)
        stack.callback(self._placement.restore)
        self._placement.apply(fitted.structure, self.plan)
        if fitted.experts:
            self._experts = self._expert_part(fitted, loaded)
            self._experts.place(self.plan, stack)
        if self.plan.kv.memory_bytes:
            self._kv = self._kv_part()
            self._kv.open(self.model, stack)
        self._ledger.charge("KV cache", self.plan.kv.reserved_bytes)
        self._ledger.charge("activations", self.plan.activation_bytes)
        self._ledger.charge(INPUTS, self._needs.reserved_bytes)
        stack.callback(self._release_slots)
        self._take_slots()
        self._wrap_modules(stack)

    def _load(self, stack: ExitStack, loader: CheckpointLoader | None) -> LoadedModel:
        if loader is None:
            assert isinstance(self._target, nn.Module)
            self._sample = None
            self._held_bytes = _anonymous_bytes(self._target)
            self._budgets = self._resolve_budgets(self._held_bytes)
            return LoadedModel(self._target, {})
        self._held_bytes = 0
        self._budgets = self._resolve_budgets(0)
        self._sources = frozenset(item.range.path for item in loader.stored.values())
        self._sample = max((item.range.path for item in loader.stored.values()), key=os.path.getsize, default=None)
        outline = loader.outline()
        apart: tuple[ExpertsUnit, ...] = ()
        if outline is not None:
            # What cannot fit is refused before anything is loaded.
            self._count_activations(outline)
            apart = self._fitted(outline, loader.slot_bytes, self._experts_wanted()).experts
        shapes = {name: tuple(value.shape) for unit in apart for name, value in unit.parameters.items()}
        loaded = loader.load(self._disk_dir, self._progress, shapes)
        for file in loaded.files:
            stack.callback(file.close)
        return loaded

    def _resolve_budgets(self, held_bytes: int) -> Budgets:
        return resolve_budgets(self._device, self._request.gpu_memory, self._request.cpu_memory, held_bytes)

    def _workload(self, model: nn.Module) -> Workload:
        longest = longest_sequence(getattr(model, "config", None)) or _DEFAULT_TOKENS
        tokens = self._request.max_tokens or (min(longest, _DEFAULT_TOKENS) if takes_tokens(model) else 1)
        return Workload(self._request.batch_size, tokens, tokens)

    def _open_storage(self, stack: ExitStack, loaded: LoadedModel) -> None:
        self._parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self._weight_bytes = sum(parameter.nbytes for parameter in self.model.parameters())
        self._recorder = Recorder()
        self._meters = Meters(self._device, self._recorder, self._budgets.device_bytes, self._budgets.host_bytes)
        self._ledger = self._meters.ledger
        self._clock = PassClock(self._recorder, asynchronous=self._device.torch_device.type == "cuda")
        self._executor = LayerExecutor(self._device, self._clock)
        # On the CPU, reads go straight to where they are computed with: nothing to gain from kvikio.
        self._engine = PosixEngine() if self._device.shares_host_memory else choose_engine(self._sample)
        stack.callback(self._engine.close)
        self._link = Link("disk", _READ_THREADS, self._recorder.span)
        stack.callback(self._link.close)
        self._written = Link("disk writes", _WRITE_THREADS, self._recorder.span)
        stack.callback(self._written.close)
        self._reader = DiskReader(self._engine, self._link)
        self._placement = Placement(
            self._device,
            self._reader,
            self._ledger,
            self._meters.host_ledger,
            self._meters.disk_ledger,
            loaded.places,
            self._disk_dir,
            self._progress,
        )
        stack.callback(self._placement.close)
        if self._request.training is not None:
            self._training = self._training_part(self._request.training)

    def _training_part(self, training: Training) -> TrainingComponent:
        return TrainingComponent(
            training,
            self._request.uses_session_optimizer,
            self._device,
            self._executor,
            self._clock,
            self._placement,
            self._reader,
            self._written,
            self._meters,
            self._disk_dir,
            self._adopt_if_changed,
            self._make_room_for_training,
        )

    def _expert_part(self, fitted: FittedPlan, loaded: LoadedModel) -> ExpertComponent:
        assert self._spec.experts is not None
        options, may_round = self._request.experts, self._request.exactness == ROUNDING
        rule = rule_for_misses(options.misses, may_round, self.plan, self._spec.experts, fitted.experts, self._hardware)
        return ExpertComponent(
            self._device,
            self._executor,
            self._clock,
            self._placement,
            self._reader,
            self._ledger,
            self._spec.experts,
            fitted.experts,
            loaded.experts,
            options,
            rule,
            type(self.model).__name__,
            self.model,
            self._progress,
            self._warn,
        )

    def _kv_part(self) -> KvComponent:
        assert self._spec.kv is not None
        return KvComponent(
            self._request.kv,
            self.plan,
            self._spec.kv,
            self._reserve.workload,
            self._device,
            self._clock,
            self._link,
            self._written,
            self._disk_dir,
            self._meters.host_ledger,
            self._meters.disk_ledger,
            self._warn,
            self._hardware,
        )

    def _experts_wanted(self) -> ExpertGranularity:
        """Backward needs all experts of a layer: training streams layers."""
        if self._request.training is not None or self._request.experts.policy == IN_LAYERS:
            return ExpertGranularity.PER_LAYER
        if self._request.plan is not None:
            return ExpertGranularity.PER_EXPERT if self._request.plan.experts.slots else ExpertGranularity.PER_LAYER
        return ExpertGranularity.AUTO

    def _fit(self, experts: ExpertGranularity) -> FittedPlan:
        if not hasattr(self, "_activations"):
            self._count_activations(self.model)
        return self._fitted(self.model, self._placement.slot_bytes, experts)

    def _fitted(self, model: nn.Module, slot_bytes: Callable[[Unit], int], experts: ExpertGranularity) -> FittedPlan:
        if self._request.training is None:
            workload = self._workload(model)
            asked = self._request
            return fit(
                model,
                self._budgets,
                workload,
                slot_bytes,
                self._activations,
                experts=experts,
                kv=asked.kv,
                exactness=asked.exactness,
            )
        workload = self._workload(model)
        training, activations = self._request.training, self._activations
        fitted, self._needs = fit_training(model, training, self._budgets, workload, slot_bytes, activations)
        return fitted

    def _count_activations(self, model: nn.Module) -> None:
        self._activations = count_activations(model, self._workload(model)) if takes_tokens(model) else None

    def _take(self, fitted: FittedPlan) -> None:
        self._spec, self._by_submodule, self.plan = fitted.spec, fitted.by_submodule, fitted.plan
        self._structure = fitted.structure
        self._paged_ways = fitted.paged
        self._fallbacks += fitted.fallbacks
        self._owners = {id(value): unit.key for unit in fitted.structure.units for value in unit.parameters.values()}

    def _make_predictor(self, fitted: FittedPlan) -> None:
        self._predictor: Predictor | None = None
        if self._hardware is not None:
            dtype = str(next((value.dtype for value in self.model.parameters()), torch.float32)).removeprefix("torch.")
            self._predictor = Predictor(self.model, fitted.by_submodule, self._hardware, dtype)

    def _choose_plan(self) -> None:
        """Another plan than the rule's: the one that was given, or the fastest, where there is something to weigh."""
        workload = self._workload(self.model)
        if self._request.plan is not None:
            self.plan = given_plan(self._request.plan, self._spec, workload, self._budgets, self._request.exactness)
            check_parts(self.model, self.plan)
            if self._request.kv.asks_pages and not self.plan.kv.memory_bytes:
                raise ConfigError(
                    "the plan keeps all keys and values on the device (kv_memory_bytes is 0): leave the options of "
                    "the KV cache out, or make the plan with them"
                )
        elif (
            self._request.training is None
            and self._predictor is not None
            and (self._budgets.host_bytes is not None or self._request.exactness == ROUNDING or self._paged_ways)
        ):
            # What had to be taken apart is; where rounding is allowed, all ways are weighed.
            kept = self.plan.kept_as if self._request.exactness == ROUNDING else self.plan.asked
            self.plan, _ = self._predictor.best(self._spec, self._goal(kept(workload)), paged=self._paged_ways)
        self._reserve = KvReservation(self._spec, self.plan.asked(workload), self._grow, self._budgets.device_bytes)

    def _goal(self, workload: Workload | None = None) -> PlanGoal:
        workload = workload or self.plan.asked(self._workload(self.model))
        new_tokens = min(self._request.new_tokens or max(1, workload.total_tokens // 2), workload.total_tokens - 1)
        return PlanGoal(
            workload, max(1, workload.total_tokens - new_tokens), new_tokens, self._budgets, self._request.exactness
        )

    def _offloaded_class(self, stack: ExitStack) -> None:
        stack.callback(OffloadedModelClass(self.model, self._device.torch_device, self._fallbacks.append).undo)
        stack.callback(DeviceBuffers(self.model, self._device, self._ledger).undo)

    def _take_slots(self) -> None:
        self._ledger.charge("slots", self.plan.arena_bytes)
        self._executor.arrange(
            self.plan.weights.slot_bytes, self.plan.weights.slot_count, list(self._placement.streamed.values())
        )
        if self._experts is not None:
            self._experts.take_slots(self.plan)
        if self._meters.copy_speed is None and not self._device.shares_host_memory:
            self._meters.copy_speed = self._placement.measure_copy(self._executor.arena_tensor)

    def _release_slots(self) -> None:
        if self._training is not None:
            self._training.backward.end()
        self._executor.close_all()
        self._executor.free()
        if self._experts is not None:
            self._experts.free_slots()
        for category in ("slots", "KV cache", "activations", INPUTS):
            self._ledger.release(category, self._ledger.held_bytes(category))

    def _wrap_modules(self, stack: ExitStack) -> None:
        self._watch = RegistrationWatch(self.model)
        stack.callback(self._watch.close)
        chunk = self.plan.splits.prefill_chunk
        self._root = ModelPass(
            self._device,
            self._executor,
            self._clock,
            self._reserve,
            self._before_pass,
            self._meters.sample_peak,
            chunk,
            self._kv,
        )
        if chunk:
            stack.callback(PrefillChunks(self.model, chunk).undo)
        stack.callback(ForwardWrap(self.model, self._root.wrap).undo)
        if self._training is not None:
            self._fallbacks += self._training.install(self.model, self._structure, stack)
        if self._experts is not None:
            # Inside of the layers' windows, which may be made anew.
            self._experts.wrap_modules(stack)
        self._wrappers = self._wrappers_of(self._structure.units)
        stack.callback(lambda: self._wrappers.undo())
        self._prefixes = PrefixCache(
            self.model,
            self._device,
            self._root,
            self._request.kv,
            self.plan,
            self._source_key,
            self._loading_beats_computing,
            self._warn,
            self._link,
            self._written,
        )

    def _loading_beats_computing(self, nbytes: int) -> bool:
        """Of a block of a beginning: whether the disk gives it faster than it is computed, as far as is known."""
        if self._predictor is None or self._hardware is None:
            return True
        prefill, decode = self._predictor.work(self._spec, 1, BLOCK_TOKENS, BLOCK_TOKENS)
        computed = predict(self.plan, self._spec, self._predictor.cost, prefill, decode).prefill_seconds
        return self._hardware.disk_read.seconds(nbytes) < computed

    def _wrappers_of(self, units: list[Unit]) -> ModuleWrappers:
        placement = self._placement
        around = {key: self.model.get_submodule(key) for key in self._by_submodule}
        return ModuleWrappers(
            units, around, self.plan, placement.cpu_gpu_split, self._onloaded, self._executor, self._clock, self._warn
        )

    def _warn(self, sentence: str) -> None:
        """Of what is slower than planned, once: it may be found in every layer of every pass."""
        if sentence not in self._fallbacks:
            self._fallbacks.append(sentence)

    def _onloaded(self, unit: Unit) -> OnloadedModule:
        if self._training is not None:
            return self._training.wrapper(unit)
        return OnloadedModule(unit, self._executor, self._clock, self._placement.tables)

    def _before_pass(self) -> None:
        self._engine.check_unchanged()
        if self._training is not None:
            self._training.before_pass()
        self._adopt_if_changed()

    def _adopt_if_changed(self) -> None:
        if self._watch.take():
            with HeldInterrupts(), torch.inference_mode(False):
                self._adopt_changes()

    def _adopt_changes(self) -> None:
        """Modules or parameters were added or replaced: they are held on the device, and get windows."""
        added_bytes = self._placement.added_bytes(self.model)
        self._spec = replace(self._spec, always_resident_bytes=self._spec.always_resident_bytes + added_bytes)
        if added_bytes > (self._ledger.free_bytes or 0):
            self._make_room(added_bytes)
        self._placement.adopt(self.model)
        apart = () if self._experts is None else self._experts.parameters
        units = find_structure(self.model, self._by_submodule, apart).units
        for unit in units:
            owners = (self._owners.get(id(value)) for value in unit.module.parameters())
            unit.uses = tuple(dict.fromkeys(key for key in owners if key is not None))
        self._wrappers.undo()
        self._wrappers = self._wrappers_of([unit for unit in units if unit.uses])

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What trains all parameters that require a gradient when it is first asked for; works with torch's schedulers.

        With `training=Training(...)` it is there from the first forward pass on; with `training=True` it has to be asked for
        before the first backward, since it adds gradients up in its own way.

        Raises:
            SessionError: in a session without `training`, or if nothing requires a gradient, or some have one already.
            BudgetExceeded: if there is no room for gradients and states.
        """
        return self._trains().optimize().optimizer

    def backward(self, losses: Sequence[Callable[[], torch.Tensor]], layer_major: bool = True) -> list[float]:
        """Forward and backward of several micro-batches, whose gradients add up.

        Args:
            losses: each computes the loss of one micro-batch with `session.model` when it is called, times its share of the
                step's items (`token_shares`), so that they add up to the mean over all.
            layer_major: every block is brought once for all of them, not once for each. Nothing else changes, not a bit; what
                layers pass on is held for all of them at once. Random numbers are each micro-batch's own: seed them in the
                call if they are to be the same in either order.

        Returns:
            The losses.
        """
        return self._trains().run(losses, layer_major, self._root)

    def training_estimate(self, micro_batches: int = 1, layer_major: bool = True) -> TrainingEstimate:
        """Where everything that is trained lives, what a step writes to disk, and how long it is predicted to take.

        Args:
            micro_batches: whose gradients a step adds up.
        """
        managed, workload = self._trains().optimize(), self._workload(self.model)
        return estimate_training(
            managed, self.model, self.plan, self._spec, workload, self._predictor, micro_batches, layer_major
        )

    def save(self, folder: str | Path, progress: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint of what is trained, to resume from, in place of the folder's last one.

        States in CPU memory are written while training goes on; `step` waits for what it is about to change. A checkpoint is
        whole, or the last one stays.

        Args:
            progress: what `resume` gives back, in JSON's terms.

        Raises:
            DiskFull: if there is no room.
        """
        self._trains().save(folder, progress or {}, self._sources)

    def resume(self, folder: str | Path) -> dict[str, Any] | None:
        """Take training up where a checkpoint left it, before the first step.

        Returns:
            The progress that it was saved with; None if the folder has no checkpoint.

        Raises:
            CorruptCheckpoint: if it is not whole.
            ConfigError: if it is of another model or optimizer.
        """
        return self._trains().resume(folder, self._sources)

    def step(self, max_grad_norm: float | None = None, overlap: bool = False) -> float:
        """Clip the gradients, update what is trained, and forget the gradients.

        Args:
            max_grad_norm: of all gradients together; None to leave them as they are.
            overlap: return at once; a block is updated when the next forward comes to it, and states are read and written
                meanwhile. The same values, but the model's weights are not to be looked at before the next forward, `save`,
                or `finish`.

        Returns:
            The norm before.

        Raises:
            TrainingError: if it is no number; nothing was changed.
        """
        return self._trains().optimize().step(max_grad_norm, overlap)

    def finish(self) -> None:
        """Update what `step(overlap=True)` left to be updated."""
        self._trains().optimize().finish()

    def _trains(self) -> TrainingComponent:
        if self._training is None or not self._inside:
            raise SessionError("the session does not train: give offload(..., training=True), and enter it")
        return self._training

    def _make_room_for_training(self, nbytes: int) -> None:
        """Where it was not known beforehand what would be trained."""
        if self._device.shares_host_memory and nbytes > (self._ledger.free_bytes or 0):
            self._spec = replace(self._spec, always_resident_bytes=self._spec.always_resident_bytes + nbytes)
            self._make_room(nbytes)

    def _make_room(self, added_bytes: int) -> None:
        try:
            self._grow(self._reserve.workload)
        except BudgetTooSmall as error:
            raise BudgetExceeded(
                f"{gib(added_bytes)} are needed for what is trained or was added to the model. With every block given up "
                f"that can be, {gib(error.least_bytes)} would do, and the budget is {gib(self._budgets.device_bytes)}"
            ) from error

    def _grow(self, workload: Workload) -> None:
        """Make room for a larger workload: give up resident blocks. Raises BudgetTooSmall if that is not enough."""
        if self._training is not None and self._training.streamed_training is not None:
            raise BudgetExceeded(
                "more memory is needed than was set aside when training began, and nothing is given up meanwhile; enter with "
                "the batch_size and max_tokens that will be used"
            )
        candidates = frozenset(self.plan.weights.resident)
        beside = self.plan.host_compute
        plan = make_plan(self._spec, self._budgets.device_bytes, workload, self._budgets.host_bytes, candidates, beside)
        with HeldInterrupts(), torch.inference_mode(False):
            slots = min(plan.experts.slots, self.plan.experts.slots)
            splits = replace(plan.splits, prefill_chunk=self.plan.splits.prefill_chunk)
            self._give_up_for(replace(plan, splits=splits, experts=replace(plan.experts, slots=slots)))

    def _give_up_for(self, plan: Plan) -> None:
        self._executor.free()
        if self._experts is not None:
            self._experts.free_slots()
        self._ledger.release("slots", self._ledger.held_bytes("slots"))
        given_up = len(self.plan.weights.resident) - len(plan.weights.resident)
        self._placement.give_up(plan, self._structure)
        self._ledger.set("KV cache", plan.kv.reserved_bytes)
        self._ledger.set("activations", plan.activation_bytes)
        self.plan = self._placement.as_placed(plan)
        self._take_slots()
        if given_up:
            self._fallbacks.append(
                f"more memory was needed than was reserved: {given_up} resident blocks were given up and are streamed now"
            )


def _told_between_interrupts(interrupts: HeldInterrupts, progress: Progress, what: str, done: int, total: int) -> None:
    interrupts.let_through()
    progress(what, done, total)


def _anonymous_bytes(model: nn.Module) -> int:
    maps = FileMaps()
    return sum(value.nbytes for value in model.parameters() if maps.locate(value.data) is None)
