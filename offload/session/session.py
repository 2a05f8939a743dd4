"""The context manager. It owns the lifetime of everything that a session takes."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import ClassVar

import torch
from torch import nn

from offload.adapters.peft import inject_adapters
from offload.config import ROUNDING, Budgets, Progress, resolve_budgets, what_it_risks
from offload.model.caches import keeps_cache
from offload.model.checkpoint_folder import find_model
from offload.model.experts import find_experts
from offload.model.homes import FileMaps
from offload.model.loading import CheckpointLoader, LoadedModel
from offload.planning.fit import ExpertGranularity, FittedPlan
from offload.probe import kept_profile, suits
from offload.report.live import Snapshot
from offload.report.report import Report
from offload.runtime.call import Call, CallKind
from offload.runtime.compiled_code import whole_model
from offload.runtime.executor import LayerExecutor
from offload.runtime.interrupts import HeldInterrupts
from offload.runtime.kernel_memory import KernelMemory
from offload.runtime.machine import Machine, machine_of
from offload.runtime.meters import bytes_between_layers
from offload.runtime.module_wrappers import ForwardWrap
from offload.runtime.passes import ModelPass
from offload.runtime.placement import Placement
from offload.runtime.prefill_chunks import PrefillChunks
from offload.scheduler.model_spec import ActivationSizes, Workload
from offload.scheduler.plan import Plan
from offload.scheduler.renamed import Renamed
from offload.scheduler.trace import Trace
from offload.session.cache_methods import CacheMethods
from offload.session.components import components_of
from offload.session.expert_methods import ExpertMethods
from offload.session.model_notes import notes_on
from offload.session.opened import Opened
from offload.session.prepare import (
    PlanInput,
    Prepared,
    activations_of,
    first_that_fits,
    fit_input,
    goal_of,
    prepare,
    workload_of,
    workloads,
)
from offload.session.reporting import Reporter, Subject
from offload.session.request import Request
from offload.session.residency import Residency
from offload.session.training_methods import TrainingMethods
from offload.storage.block_file import make_folder
from offload.storage.errors import ConfigError, ProfileError, SessionError
from offload.storage.host_buffer import release_freed_memory
from offload.storage.process_memory import process_bytes


class Session(TrainingMethods, CacheMethods, ExpertMethods, Renamed):
    """An offloaded model, from `with` to the end of its block. Made by `offload`.

    Example:
        ::

            with offload("org/model", gpu_memory="8GiB") as session:
                output = session.model.generate(**inputs, max_new_tokens=100)
                print(session.report())
    """

    RENAMED: ClassVar[Mapping[str, str]] = {
        "keeps_beginnings": "caches_prefixes",
        "shares_beginnings": "shares_prefixes",
        "outlook": "training_estimate",
    }

    def __init__(self, request: Request) -> None:
        self._request = request
        self._hardware = request.hardware or kept_profile(request.device, request.disk_dir)
        if request.hardware is not None and not suits(request.hardware, request.device):
            has = "no GPU" if request.hardware.device is None else "a GPU"
            raise ProfileError(f"the hardware profile describes a machine with {has}, and {request.device.name} computes here")
        self._stack: ExitStack | None = None
        self._opened: Opened | None = None
        self._inside = False
        self._process = os.getpid()

    def __enter__(self) -> "Session":
        if self._stack is not None:
            raise SessionError("this session was entered already; call offload(...) again for another one")
        self._stack = ExitStack()
        release_freed_memory()
        before_bytes = process_bytes()
        loader, adapter = self._find()
        try:
            # Parameters, homes and slots outlive an inference mode that the user is in, and are written to after it.
            with HeldInterrupts() as interrupts, torch.inference_mode(False):
                progress = partial(_progress_between_interrupts, interrupts, self._request.progress)
                self._opened = self._open(self._stack, loader, progress, before_bytes)
                if adapter is not None:
                    inject_adapters(self._opened.model, adapter)
        except BaseException:
            with HeldInterrupts():
                self._stack.close()
            raise
        self._inside = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._stack is not None
        if os.getpid() != self._process:
            # Forked: threads and locks are the parent's.
            return
        # A pass that another thread is in the middle of is waited for.
        with HeldInterrupts(), self._parts.machine.lock:
            self._inside = False
            self._stack.close()

    @property
    def model(self) -> nn.Module:
        """The model: plain transformers code works on it, `generate` and `state_dict` included."""
        model = self._parts.model
        return model if self._request.compiled is None else self._request.compiled

    @property
    def plan(self) -> Plan:
        """What lives where, as it is now."""
        return self._parts.residency.plan

    @property
    def machine(self) -> Machine:
        """What the session runs on."""
        return self._parts.machine

    def report(self) -> Report:
        """Report what was moved and how fast, so far, beside what was predicted for it. Measures the disk for a moment."""
        return self._parts.reporter.report(may_measure=self._inside)

    def snapshot(self) -> Snapshot:
        """Say where it stands: cheap, and from any thread while the model runs. What it takes to measure is in `report`."""
        return self._parts.reporter.snapshot()

    def trace(self) -> Trace:
        """Return when each resource was busy, so far: spans and memory over time. Sums are in `report`."""
        machine = self._parts.machine
        machine.copies.collect()
        return machine.host.recorder.trace

    @property
    def _parts(self) -> Opened:
        if self._opened is None:
            raise SessionError(
                "there is no model and nothing to report yet: enter the session first, `with offload(...) as session:`"
            )
        return self._opened

    def _find(self) -> tuple[CheckpointLoader | None, str | None]:
        """Find the checkpoint, downloaded if need be, and what adapts it; None for a model that the user holds."""
        request = self._request
        if isinstance(request.target, nn.Module):
            if request.kv.prefix_dir is not None:
                make_folder(request.kv.prefix_dir)
                raise ConfigError("prefix_cache needs a model by its path: what a model in memory was made of is not known")
            return None, None
        folder, adapter = find_model(request.target, request.loading)
        loader = CheckpointLoader(folder, request.loading if adapter is None else replace(request.loading, subfolder=""))
        if request.kv.prefix_dir is not None:
            make_folder(request.kv.prefix_dir)
        return loader, adapter

    def _open(self, stack: ExitStack, loader: CheckpointLoader | None, progress: Progress, before_bytes: int) -> Opened:
        request = self._request
        held_bytes = _anonymous_bytes(request.target) if isinstance(request.target, nn.Module) else 0
        budgets = self._budgets(held_bytes)
        loaded, workload = self._load(stack, loader, budgets, progress)
        model = loaded.model
        machine = self._machine(stack, loader, budgets, progress)
        risk = what_it_risks(budgets, held_bytes)
        for note in (*loaded.fallbacks, *([] if risk is None else [risk])):
            machine.notes.warn(note)
        placement = Placement(machine, loaded.places)
        stack.callback(placement.close)
        granularity = ExpertGranularity.PER_EXPERT if loaded.experts else None

        def attempt(workload: Workload) -> tuple[Plan, tuple[PlanInput, ActivationSizes | None, Prepared]]:
            given, activations = self._given(workload, budgets), activations_of(model, workload)
            prepared = prepare(model, given, placement.slot_bytes, activations, granularity)
            return prepared.plan, (given, activations, prepared)

        choices = workloads(workload, request.max_tokens is None)
        reserved, (given, activations, prepared) = first_that_fits(choices, attempt, self._may_round)
        for note in notes_on(model, machine.device, activations, self._hardware, reserved, request.max_tokens):
            machine.notes.warn(note)
        for note in prepared.notes:
            machine.notes.warn(note)
        executor = LayerExecutor(machine.device, machine.clock, machine.lock)
        kernels = None
        if not machine.discrete:
            before = before_bytes - held_bytes
            between = bytes_between_layers(before, budgets.device_bytes, prepared.plan)
            kernels = KernelMemory(between, before + budgets.device_bytes)
            executor.after_use = kernels.glance
        residency = Residency(machine, executor, placement, model, prepared, budgets)
        key = None if loader is None or request.kv.prefix_dir is None else loader.key
        components = components_of(request, prepared, machine, executor, residency, loaded.experts, key)
        residency.open(components, stack)
        root = _attach(stack, model, machine, residency, kernels)
        name = request.target if isinstance(request.target, str) else type(model).__name__
        subject = Subject.of(model, name, before_bytes, held_bytes)
        return Opened(
            model=model,
            machine=machine,
            executor=executor,
            given=given,
            prepared=prepared,
            residency=residency,
            components={component.name: component for component in components},
            root=root,
            reporter=Reporter(
                machine,
                executor,
                residency,
                subject,
                lambda: goal_of(given, residency.plan.asked(given.workload)),
                prepared.predictor,
            ),
            sources=frozenset() if loader is None else loader.sources,
        )

    def _budgets(self, held_bytes: int) -> Budgets:
        request = self._request
        if request.machine is not None:
            return request.machine.free_budgets(request.gpu_memory, request.cpu_memory)
        return resolve_budgets(request.device, request.gpu_memory, request.cpu_memory, held_bytes).check_free(request.device)

    @property
    def _may_round(self) -> bool:
        """Passes may be taken apart without need."""
        return self._request.exactness == ROUNDING or self._request.kv.asks_pages

    def _given(self, workload: Workload, budgets: Budgets) -> PlanInput:
        request = self._request
        return PlanInput(
            budgets=budgets,
            workload=workload,
            new_tokens=request.new_tokens or max(1, workload.total_tokens // 2),
            exactness=request.exactness,
            experts=request.experts,
            kv=request.kv,
            training=request.training,
            hardware=self._hardware,
            plan=request.plan,
        )

    def _load(
        self, stack: ExitStack, loader: CheckpointLoader | None, budgets: Budgets, progress: Progress
    ) -> tuple[LoadedModel, Workload]:
        """Load the model, after its outline was found to fit; with what memory is reserved for."""
        request = self._request
        if loader is None:
            model = request.target
            assert isinstance(model, nn.Module)
            return LoadedModel(model, {}), workload_of(model, request.batch_size, request.max_tokens)
        outline, shapes, workload = loader.outline(), {}, None
        if outline is not None:
            # What cannot fit is refused before anything is loaded.
            def attempt(workload: Workload) -> tuple[Plan, FittedPlan]:
                given, activations = self._given(workload, budgets), activations_of(outline, workload)
                fitted, _ = fit_input(outline, given, loader.slot_bytes, activations, given.granularity)
                return fitted.plan, fitted

            asked = workload_of(outline, request.batch_size, request.max_tokens)
            choices = workloads(asked, request.max_tokens is None)
            workload, fitted = first_that_fits(choices, attempt, self._may_round)
            shapes = {name: tuple(value.shape) for unit in fitted.experts for name, value in unit.parameters.items()}
        loaded = loader.load(request.disk_dir, progress, shapes)
        for file in loaded.files:
            stack.callback(file.close)
        return loaded, workload or workload_of(loaded.model, request.batch_size, request.max_tokens)

    def _machine(self, stack: ExitStack, loader: CheckpointLoader | None, budgets: Budgets, progress: Progress) -> Machine:
        request = self._request
        machine = request.machine
        if machine is None:
            sample = None if loader is None else max(loader.sources, key=os.path.getsize, default=None)
            machine = stack.enter_context(machine_of(request.device, budgets, request.disk_dir, sample, progress))
        return machine.for_session(budgets, request.disk_dir or machine.host.disk_dir, progress)


def _progress_between_interrupts(interrupts: HeldInterrupts, progress: Progress, what: str, done: int, total: int) -> None:
    interrupts.let_through()
    progress(what, done, total)


def _anonymous_bytes(model: nn.Module) -> int:
    maps = FileMaps()
    return sum(value.nbytes for value in model.parameters() if maps.locate(value.data) is None)


def _attach(
    stack: ExitStack, model: nn.Module, machine: Machine, residency: Residency, kernels: KernelMemory | None
) -> ModelPass:
    """Wrap the model and its modules, from the outside to the inside."""
    residency.watch(stack)
    experts = [unit.module for unit in find_experts(model)]
    chunk = residency.plan.splits.prefill_chunk

    def before(call: Call) -> None:
        machine.host.engine.check_unchanged()
        residency.before_pass(call)
        if kernels is not None and call.kind is CallKind.PREFILL and not call.continues:
            kernels.before_prompt()

    makers = [component.cache_maker(model) for component in residency.components]
    new_cache = next((maker for maker in makers if maker is not None), None)
    root = ModelPass(machine, before, residency.after_pass, residency.pass_is_over, chunk, new_cache, keeps_cache(model))
    if chunk:
        stack.callback(PrefillChunks(model, chunk).undo)
    stack.callback(ForwardWrap(model, root.wrap).undo)
    stack.callback(ForwardWrap(model, whole_model).undo)
    for component in residency.components:
        component.attach(model, stack)
    if kernels is not None:
        for module in experts:
            stack.callback(ForwardWrap(module, kernels.few_sizes).undo)
    residency.wrap(stack)
    return root
