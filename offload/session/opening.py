"""How a session takes hold of a model: found, planned for, loaded, placed on its tiers, wrapped."""

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace

from torch import nn

from offload.adapters.peft import inject_adapters
from offload.budgets import Budgets, what_it_risks
from offload.config import ROUNDING, Progress
from offload.model.caches import keeps_cache
from offload.model.checkpoint_folder import find_model
from offload.model.experts import find_experts
from offload.model.loading import CheckpointLoader, LoadedModel
from offload.model.placeholders import EncodedValues, Placeholders, Values
from offload.planning.fit import ExpertGranularity, FittedPlan
from offload.runtime.call import Call, CallKind
from offload.runtime.compiled_code import whole_model
from offload.runtime.early_reads import EarlyReads
from offload.runtime.executor import LayerExecutor
from offload.runtime.kernel_memory import KernelMemory
from offload.runtime.machine import Machine
from offload.runtime.meters import bytes_between_layers
from offload.runtime.module_wrappers import ForwardWrap
from offload.runtime.passes import ModelPass
from offload.runtime.placement import Placement
from offload.runtime.prefill_chunks import PrefillChunks
from offload.scheduler.hardware import HardwareProfile
from offload.scheduler.model_spec import ActivationSizes, Workload
from offload.scheduler.plan import Plan
from offload.session.components import components_of
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
from offload.session.session_machine import session_machine
from offload.storage.block_file import make_folder
from offload.storage.codecs.weights import EncodedTensor
from offload.storage.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Opening:
    """What a session begins with.

    Attributes:
        hardware: the profile of the machine; None if it was not measured.
        stack: takes what is to be undone when the session ends.
        before_bytes: of the process, before anything.
        held_bytes: of these, the weights of a model that the user holds.
        machine: what the session runs on; None to open it once the files are known that will be read.
        early: reads of resident weights that were begun already.
    """

    request: Request
    hardware: HardwareProfile | None
    stack: ExitStack
    progress: Progress
    budgets: Budgets
    before_bytes: int
    held_bytes: int
    machine: Machine | None
    early: EarlyReads | None

    def open(self) -> Opened:
        """Do all of it.

        Raises:
            OffloadError: if it cannot be; what was done by then is undone by the stack.
        """
        loader, adapter = self._find()
        opened = self._open(loader)
        if adapter is not None:
            inject_adapters(opened.model, adapter)
        return opened

    def _find(self) -> tuple[CheckpointLoader | None, str | None]:
        """Find the checkpoint, downloaded if need be, and what adapts it; None for a model that the user holds."""
        request = self.request
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

    def _open(self, loader: CheckpointLoader | None) -> Opened:
        request, stack, budgets, hardware = self.request, self.stack, self.budgets, self.hardware
        encoded = loader is not None and (loader.weights is not None or loader.encoding is not None)
        if loader is not None and encoded and request.training is not None and request.training.full:
            raise ConfigError(
                f"the weights of {loader.folder} {'would be encoded (weights=)' if loader.encoding else 'are quantised'}: "
                "adapters can be trained on such weights (LoRA), the weights themselves cannot"
            )
        loaded, workload = self._load(loader)
        model = loaded.model
        machine = self.machine or self._machine(loader)
        risk = what_it_risks(budgets, self.held_bytes)
        for note in (*loaded.fallbacks, *([] if risk is None else [risk])):
            machine.notes.warn(note)
        placement = Placement(machine, loaded.places)
        stack.callback(placement.close)
        granularity = ExpertGranularity.PER_EXPERT if loaded.experts else None

        def attempt(workload: Workload) -> tuple[Plan, tuple[PlanInput, ActivationSizes | None, Prepared]]:
            given, activations = self._given(workload), activations_of(model, workload)
            prepared = prepare(model, given, placement.size_of, activations, granularity, loaded.outline)
            return prepared.plan, (given, activations, prepared)

        choices = workloads(workload, request.max_tokens is None)
        reserved, (given, activations, prepared) = first_that_fits(choices, attempt, self._may_round)
        for note in notes_on(model, machine.device, activations, hardware, reserved, request.max_tokens):
            machine.notes.warn(note)
        for note in prepared.notes:
            machine.notes.warn(note)
        executor = LayerExecutor(machine.device, machine.clock, machine.lock)
        kernels = None
        if not machine.discrete:
            before = self.before_bytes - self.held_bytes
            between = bytes_between_layers(before, budgets.device_bytes, prepared.plan)
            kernels = KernelMemory(between, before + budgets.device_bytes)
            executor.after_use = kernels.glance
        residency = Residency(machine, executor, placement, model, prepared, budgets)
        key = None if loader is None or request.kv.prefix_dir is None else loader.key
        components = components_of(request, prepared, machine, executor, residency, loaded.experts, key)
        residency.open(components, stack, self.early)
        _stand_in(model, loaded, placement, stack)
        root = _attach(stack, model, machine, residency, kernels)
        name = request.target if isinstance(request.target, str) else type(model).__name__
        subject = Subject.of(model, name, self.before_bytes, self.held_bytes)
        if loader is not None and loader.encoding is not None:
            subject = replace(subject, exactness=f"lossy: {loader.encoding}")
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

    @property
    def _may_round(self) -> bool:
        """Passes may be taken apart without need."""
        return self.request.exactness == ROUNDING or self.request.kv.asks_pages

    def _given(self, workload: Workload) -> PlanInput:
        request = self.request
        return PlanInput(
            budgets=self.budgets,
            workload=workload,
            new_tokens=request.new_tokens or max(1, workload.total_tokens // 2),
            exactness=request.exactness,
            experts=request.experts,
            kv=request.kv,
            training=request.training,
            hardware=self.hardware,
            plan=request.plan,
        )

    def _load(self, loader: CheckpointLoader | None) -> tuple[LoadedModel, Workload]:
        """Load the model, after its outline was found to fit; with what memory is reserved for."""
        request = self.request
        if loader is None:
            model = request.target
            assert isinstance(model, nn.Module)
            return LoadedModel(model, {}), workload_of(model, request.batch_size, request.max_tokens)
        outline, shapes, workload = loader.outline(), {}, None
        if outline is not None:
            # What cannot fit is refused before anything is loaded.
            def attempt(workload: Workload) -> tuple[Plan, FittedPlan]:
                given, activations = self._given(workload), activations_of(outline, workload)
                fitted, _ = fit_input(outline, given, loader.size_of, activations, given.granularity)
                return fitted.plan, fitted

            asked = workload_of(outline, request.batch_size, request.max_tokens)
            choices = workloads(asked, request.max_tokens is None)
            workload, fitted = first_that_fits(choices, attempt, self._may_round)
            shapes = {name: tuple(value.shape) for unit in fitted.experts for name, value in unit.parameters.items()}
        loaded = loader.load(request.disk_dir, self.progress, shapes)
        loaded.outline = outline
        for file in loaded.files:
            self.stack.callback(file.close)
        return loaded, workload or workload_of(loaded.model, request.batch_size, request.max_tokens)

    def _machine(self, loader: CheckpointLoader | None) -> Machine:
        """What this session alone runs on."""
        request = self.request
        sample = None if loader is None else max(loader.sources, key=os.path.getsize, default=None)
        return session_machine(request, self.budgets, self.progress, self.stack, sample)


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


def _stand_in(model: nn.Module, loaded: LoadedModel, placement: Placement, stack: ExitStack) -> None:
    """Have parameters that are decoded for each use ready for who asks for all their values."""

    def settle(parameter: nn.Parameter) -> None:
        home = placement.home_of(parameter)
        if home is not None:
            home.settle()

    values: dict[str, dict[str, Values]] = {}
    for name, source in loaded.places.items():
        if isinstance(source, EncodedTensor):
            path, _, own = name.rpartition(".")
            values.setdefault(path, {})[own] = EncodedValues(source)
    for path, encoded in values.items():
        stack.callback(Placeholders(model.get_submodule(path), encoded, settle).keep)
