"""The plan that a session runs by, as it is now: slots taken and given back, blocks given up, changes adopted."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import nn

from offload.budgets import Budgets
from offload.model.blocks import Structure, Unit, find_structure
from offload.runtime.buffers import DeviceBuffers
from offload.runtime.call import Call
from offload.runtime.compiled_code import CompiledLayers
from offload.runtime.component import Component
from offload.runtime.early_reads import EarlyReads
from offload.runtime.executor import LayerExecutor
from offload.runtime.file_copies import FileCopies
from offload.runtime.interrupts import HeldInterrupts
from offload.runtime.late_generation import GenerationWatch
from offload.runtime.machine import Machine
from offload.runtime.merged_adapters import MergedAdapters
from offload.runtime.model_facade import OffloadedModelClass
from offload.runtime.module_wrappers import ModuleWrappers, OnloadedModule
from offload.runtime.placement import Placement
from offload.runtime.registration_watch import RegistrationWatch
from offload.runtime.unseen_edits import UnseenEdits
from offload.scheduler.model_spec import BlockRole, ModelSpec, Workload
from offload.scheduler.plan import Plan
from offload.scheduler.planner import make_plan
from offload.session.prepare import Prepared
from offload.storage.arrival import Arrival
from offload.storage.blocks import BlockKey
from offload.storage.errors import BudgetExceeded, BudgetTooSmall, gib

_ACTIVATIONS = "activations"
_SLOTS = "slots"


class Residency:
    """What lives where in one session.

    Attributes:
        plan: as it is carried out now.
        spec: of the model, with what was added to it since.
    """

    def __init__(
        self,
        machine: Machine,
        executor: LayerExecutor,
        placement: Placement,
        model: nn.Module,
        prepared: Prepared,
        budgets: Budgets,
    ) -> None:
        self.plan: Plan = prepared.plan
        self.spec: ModelSpec = prepared.fitted.spec
        self.structure: Structure = prepared.fitted.structure
        self.placement = placement
        self.components: Sequence[Component] = ()
        self._machine = machine
        self._executor = executor
        self._model = model
        self._budgets = budgets
        self.by_submodule = prepared.fitted.by_submodule
        self._taken_apart = self.by_submodule.modules(model)
        self._workload: Workload = prepared.workload
        self._owners: dict[int, BlockKey] = {
            id(value): unit.key for unit in self.structure.units for value in unit.parameters.values()
        }
        self._call: Call | None = None
        self._edits = UnseenEdits()
        self._merged = MergedAdapters(model)
        self._copies = FileCopies()
        self.compiled = CompiledLayers(len(self.structure.units), machine.notes.warn)
        self._watch: RegistrationWatch | None = None
        self._wrappers: ModuleWrappers | None = None

    def open(self, components: Sequence[Component], stack: ExitStack, early: EarlyReads | None) -> None:
        """Bring the model to its tiers, and take the slots; undone by `stack`.

        Args:
            components: take their part of the slots, and what they have of modules.
            early: reads of resident weights that were begun already.
        """
        self.components = components
        if any(type(component).extras is not Component.extras for component in components):
            self._executor.extras = self._extras
        machine, model = self._machine, self._model
        watch = GenerationWatch(model)
        stack.callback(watch.close)
        stack.callback(OffloadedModelClass(model, machine.device.torch_device, machine.notes.warn, watch).undo)
        stack.callback(DeviceBuffers(model, machine.device, machine.ledger).undo)
        stack.callback(self._restore)
        self.placement.on_resident = self._copies.add
        self.placement.early = early
        self.placement.apply(self.structure, self.plan)
        if early is not None:
            early.drop()
            early.remember(self.placement.loading.ranges, self.plan.device_bytes)
        self._executor.loading = self.placement.loading
        if any(component.reads_weights for component in components):
            self.placement.loading.finish()
        for component in components:
            component.open(model, stack)
        machine.ledger.charge(_ACTIVATIONS, self.plan.activation_bytes)
        stack.callback(self._close)
        self._take_slots()

    def watch(self, stack: ExitStack) -> None:
        """Notice from now on what is added to the model; before anything is wrapped."""
        self._watch = RegistrationWatch(self._model)
        stack.callback(self._watch.close)

    def wrap(self, stack: ExitStack) -> None:
        """Wrap every unit, around what components wrap."""
        stack.callback(self.compiled.undo)
        self._wrappers = self._wrappers_of(self.structure.units)
        stack.callback(lambda: self._wrappers.undo() if self._wrappers is not None else None)

    def before_pass(self, call: Call) -> None:
        """Have every component prepare for the pass, and adopt what changed."""
        self._call = call
        if self._executor.loading is not None:
            self._edits.look_anew()
        if not self._edits.mark(self.placement.homes):
            self._machine.notes.warn(
                "this system does not tell which memory was written to (/proc/self/pagemap): edits of weights through .data or "
                "NumPy are not seen; write to the parameters themselves, under torch.no_grad()"
            )
            self._merged.check()
        for component in self.components:
            component.before_pass(call)
        self.adopt_if_changed()

    def after_pass(self, call: Call) -> None:
        """Have every component take note of a pass that succeeded."""
        self._finish_loading()
        for component in self.components:
            component.after_pass(call)

    def edited_weight(self) -> str | None:
        """The name of a weight that has other values than its file, by whatever view it was written; None if none has."""
        self._edits.mark(self.placement.homes)
        seen = next((home.name for home in self.placement.homes if home.was_changed), None)
        return seen or self._copies.edited()

    def pass_is_over(self) -> None:
        """Whatever came of it."""
        self._call = None
        self._machine.meters.sample_peak()

    def adopt_if_changed(self) -> None:
        """Take over modules and parameters that were added or replaced since the last pass."""
        if self._watch is not None and self._watch.take():
            with HeldInterrupts(), torch.inference_mode(False):
                self._adopt_changes()

    def make_room(self, nbytes: int) -> None:
        """Give up resident blocks for what was not known beforehand.

        Raises:
            BudgetExceeded: if that is not enough.
        """
        if not self._machine.discrete and nbytes > (self._machine.ledger.free_bytes or 0):
            self._add_resident(nbytes)
            self._free(nbytes)

    def grow(self, workload: Workload) -> None:
        """Make room for a larger workload: give up resident blocks.

        Raises:
            BudgetTooSmall: if that is not enough.
            BudgetExceeded: while a component holds on to what the plan has.
        """
        for component in self.components:
            component.check_growth()
        plan = self._smaller_plan(workload)
        with HeldInterrupts(), torch.inference_mode(False):
            slots = min(plan.experts.slots, self.plan.experts.slots)
            splits = replace(plan.splits, prefill_chunk=self.plan.splits.prefill_chunk)
            self._give_up_for(replace(plan, splits=splits, experts=replace(plan.experts, slots=slots)))
        self._workload = workload

    def _smaller_plan(self, workload: Workload) -> Plan:
        """What is resident, or kept in its stored form, stays so as far as there is room."""
        candidates, host_compute = frozenset(self.plan.weights.resident), self.plan.host_compute
        budgets, encoded = self._budgets, list(self.plan.weights.in_host_memory)
        if budgets.host_bytes is not None or not encoded:
            return make_plan(self.spec, budgets.device_bytes, workload, budgets.host_bytes, candidates, host_compute)
        while True:
            try:
                return make_plan(self.spec, budgets.device_bytes, workload, None, candidates, encoded=frozenset(encoded))
            except BudgetTooSmall:
                if not encoded:
                    raise
                encoded = encoded[: len(encoded) // 2]

    def _extras(self, block: BlockKey) -> list[Arrival]:
        return [arrival for component in self.components for arrival in component.extras(block, self._call)]

    def _finish_loading(self) -> None:
        """What the first pass did not use comes at its end, at the latest."""
        if self._executor.loading is not None:
            self._machine.clock.leave_out(self.placement.loading.finish())
            self._executor.loading = None
            self._edits.look_anew()

    def _restore(self) -> None:
        """Give every parameter its memory back, with what was written to it by whatever view."""
        self.placement.loading.stop()
        self._edits.mark(self.placement.homes)
        self._copies.mark()
        self.placement.restore()

    def _take_slots(self) -> None:
        weights, machine = self.plan.weights, self._machine
        machine.ledger.charge(_SLOTS, self.plan.arena_bytes)
        self._executor.arrange(weights.slot_bytes, weights.slot_count, list(self.placement.streamed.values()))
        for component in self.components:
            component.take_slots(self.plan)
        if machine.meters.copy_speed is None and machine.discrete:
            machine.meters.copy_speed = machine.host.memory.copy_bytes_per_second(self._executor.arena_tensor)

    def _close(self) -> None:
        for component in self.components:
            component.free_slots()
        self._executor.close_all()
        self._executor.free()
        self._machine.ledger.set(_SLOTS, 0)
        self._machine.ledger.set(_ACTIVATIONS, 0)

    def _give_up_for(self, plan: Plan) -> None:
        self.placement.loading.finish()
        for component in self.components:
            component.free_slots()
        self._executor.free()
        self._machine.ledger.set(_SLOTS, 0)
        blocks = [self.placement.resident.get(key) for key in (*plan.weights.streamed, *plan.weights.row_fetched)]
        self._copies.mark([home for block in blocks if block is not None for home in block.homes])
        held = (*self.plan.weights.resident, *self.plan.weights.in_host_memory)
        given_up = len({*held} - {*plan.weights.resident, *plan.weights.in_host_memory})
        self.placement.give_up(plan, self.structure)
        self._machine.ledger.set(_ACTIVATIONS, plan.activation_bytes)
        self.plan = self.placement.as_placed(plan)
        self._take_slots()
        if given_up:
            self._machine.notes.warn(
                f"more memory was needed than was reserved: {given_up} resident blocks were given up and are streamed now"
            )

    def _adopt_changes(self) -> None:
        """Hold modules and parameters that were added or replaced on the device, and wrap what is there now."""
        added_bytes = self.placement.added_bytes(self._model)
        self._add_resident(added_bytes)
        if added_bytes > (self._machine.ledger.free_bytes or 0):
            self._free(added_bytes)
        self.placement.adopt(self._model)
        excluded = [value for component in self.components for value in component.excluded]
        self.by_submodule = self.by_submodule.where_they_are(self._model, self._taken_apart)
        self._taken_apart = self.by_submodule.modules(self._model)
        units = find_structure(self._model, self.by_submodule, excluded).units
        for unit in units:
            owners = (self._owners.get(id(value)) for value in unit.module.parameters())
            unit.uses = tuple(dict.fromkeys(key for key in owners if key is not None))
        if self._wrappers is not None:
            self._wrappers.undo()
        self._wrappers = self._wrappers_of([unit for unit in units if unit.uses or unit.role is BlockRole.LAYER])

    def _add_resident(self, nbytes: int) -> None:
        self.spec = replace(self.spec, always_resident_bytes=self.spec.always_resident_bytes + nbytes)

    def _free(self, added_bytes: int) -> None:
        try:
            self.grow(self._workload)
        except BudgetTooSmall as error:
            raise BudgetExceeded(
                f"{gib(added_bytes)} are needed for what is trained or was added to the model. With every block given up "
                f"that can be, {gib(error.least_bytes)} ({error.least_bytes} bytes) would do, and the budget is "
                f"{gib(self._budgets.device_bytes)}"
            ) from error

    def _wrappers_of(self, units: Sequence[Unit]) -> ModuleWrappers:
        around = {key: self._model.get_submodule(key) for key in self.by_submodule.keys}
        return ModuleWrappers(
            units,
            around,
            self.plan,
            self.placement.cpu_gpu_split,
            self._onloaded,
            self._executor,
            self._machine.clock,
            self.compiled,
        )

    def _onloaded(self, unit: Unit) -> OnloadedModule:
        for component in self.components:
            if (wrapper := component.wrapper(unit)) is not None:
                return wrapper
        return OnloadedModule(unit, self._executor, self._machine.clock, self.placement.tables)
