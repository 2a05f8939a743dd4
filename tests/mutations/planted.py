"""Faults to plant, each with the tests that must find it: all of them are in `make test` or `make test-card`."""

from dataclasses import dataclass

CARD = ("-p", "tests.pretended.plugin", "-m", "gpu")


@dataclass(frozen=True)
class Fault:
    """One change of one file.

    Attributes:
        before, after: the text that is there once, and the fault.
        tests: arguments of pytest.
    """

    file: str
    before: str
    after: str
    tests: tuple[str, ...]


def _in(file: str, before: str, after: str, *tests: str) -> Fault:
    return Fault(file, before, after, tests)


_CLAIMS = "tests/offload/test_claims.py"
_EDITS = "tests/offload/test_edits.py"
_UNDO = "tests/offload/test_undo.py"
_FULL = "tests/offload/test_full_training.py"
_KERNELS = "tests/offload/test_kernel_memory.py"
_SIMULATOR = "tests/scheduler/test_simulator.py"
_SCHEDULE = "tests/scheduler/test_slot_schedule.py"
_HUB = "tests/offload/test_hub.py"
_CHANGED = "tests/offload/test_changed_inside.py"

FAULTS = [
    # What is said of time, bytes and memory.
    _in("scheduler/hardware.py", "self.latency_seconds + nbytes /", "self.latency_seconds + 2 * nbytes /", _SIMULATOR),
    _in("scheduler/model_spec.py", "        return between + inside + joined +", "        return 0 * (between + inside) + joined +", _CLAIMS),
    _in("offload/planning/describe.py", "return ActivationSizes(int(each * scale) + 1, int(context * scale) + 1, between, state)", "return ActivationSizes(1, 1, 1, state)", _CLAIMS, "tests/offload/test_planning.py"),
    _in("scheduler/cost.py", "max(submit, matrix + other)", "max(submit, matrix)", _SIMULATOR),
    _in("scheduler/cost.py", "max(_LEAST_SHARE, given / wanted)", "1.0", _SIMULATOR),
    _in("scheduler/cost.py", "seconds = max(device, host + hops)", "seconds = device + host + hops", _SIMULATOR),
    _in("storage/pages/pool.py", "[lambda: file.write(place, memory)]", "[lambda: file.write(place, memory)] * 2", _CLAIMS),
    _in("storage/ledger.py", "self.used_bytes + nbytes > self.budget_bytes:", "nbytes > self.budget_bytes:", "tests/storage/test_ledger.py"),
    _in("storage/ledger.py", "self._parent.release(category, nbytes)", "pass", "tests/storage/test_ledger.py", "tests/offload/test_machine.py"),
    # Training.
    _in("offload/training/optimizer/checkpoint.py", "            torch.set_rng_state(torch", "            (torch", _CLAIMS),
    _in("offload/training/weighting.py", "[count / sum(counts) for", "[1 / len(counts) for", "tests/offload/test_trainer.py", "tests/offload/test_finetune.py"),
    _in("offload/training/optimizer/update_rules.py", "torch.full((), float(count - 1)", "torch.full((), float(count)", _FULL),
    _in("offload/training/optimizer/update_rules.py", 'eps=settings["eps"]', "eps=1e-6", _FULL),
    _in("offload/training/optimizer/trained_weights.py", "            home.leave_shield()\n", "", "tests/offload/test_discrete_device.py", _FULL),
    _in("offload/runtime/placement.py", "                home.leave_shield()\n", "", _EDITS),
    _in("offload/runtime/executor.py", "interval == self._clock.interval and brought is not None", "brought is not None", _EDITS, "tests/offload/test_training.py"),
    # Weights: where they are, and what was written to them.
    _in("offload/model/homes.py", "        if self.modified and not complete:", "        if False:", _EDITS),
    _in("offload/model/homes.py", "                self.device_part.copy_(self.parameter.data)", "                pass", _UNDO, _EDITS),
    _in("offload/model/homes.py", "                behind.copy_(self.tensor)", "                pass", _EDITS),
    _in("offload/model/homes.py", "                    self.original.copy_(current)", "                    pass", _UNDO, _EDITS),
    _in("offload/runtime/unseen_edits.py", "        if any(found):", "        if False:", _EDITS),
    _in("offload/runtime/weights.py", "all(self.source.brings(home) for home in changed)", "True", _EDITS),
    _in("offload/runtime/merged_adapters.py", "if merged - self._merged or", "if", _EDITS),
    _in("offload/runtime/module_wrappers.py", "return output.clone() if self._executor.in_slots(output) else output", "return output", "tests/offload/test_returned_weights.py"),
    _in("offload/runtime/module_wrappers.py", "        if self._executor.in_slots(tensor):\n            return _InSlot", "        if False:\n            return _InSlot", _UNDO),
    _in("offload/runtime/module_wrappers.py", "return MethodType(type(copied).forward, copied)", "return self", _CHANGED),
    _in("offload/runtime/registration_watch.py", "if not seen:", "if True:", _CHANGED),
    _in("offload/model/blocks.py", "now = {path: paths.get(id(module))", "now = {path: path", _CHANGED),
    # Which block has which slots.
    _in("scheduler/slot_schedule.py", "name in self._leases and name not in self._in_use)", "name in self._leases)", _SCHEDULE),
    _in("scheduler/slot_schedule.py", "holders[start] is None and (count == 1 or not any(holders[start : start + count]))", "holders[start] is None", _SCHEDULE),
    _in("scheduler/slot_schedule.py", "        self._generation += 1\n", "", _SCHEDULE, _UNDO),
    _in("scheduler/slot_schedule.py", "            room -= self._slots_of[key]\n", "", _SCHEDULE, "tests/offload/test_overlap.py"),
    _in("storage/read_plan.py", "overshoot = max(target - (ranges[index].offset - start)", "overshoot = max(0 * target", "tests/storage"),
    # Files.
    _in("storage/checkpoint.py", "        if tensor.range.offset != end:", "        if False:", "tests/offload/test_damaged_files.py", "tests/offload/test_bad_input.py"),
    _in("offload/kv/prefix_store.py", "if found != file.tensors[name].range.crc32:", "if False:", "tests/offload/test_kv_prefix.py"),
    _in("offload/model/checkpoint_folder.py", "[escape(file) for file in indexed_files(index)]", '["*.safetensors"]', _HUB),
    _in("offload/model/checkpoint_folder.py", '[_inside("*/*", options)]', "None", _HUB),
    _in("storage/codecs/affine_groups.py", "(2**self.bits - 1)).half()", "2**self.bits).half()", "tests/storage/test_codecs.py"),
    _in("storage/codecs/affine_groups.py", "steps.round()", "steps.floor()", "tests/storage/test_codecs.py"),
    # Products of few sizes, and what is kept.
    _in("offload/runtime/padded_products.py", "if not torch.equal(multiply(rows), multiply(padded)[:count]):", "if False:", _KERNELS),
    _in("offload/runtime/padded_products.py", "[: len(rows)] if more else", "if more else", _KERNELS),
    _in("offload/runtime/padded_products.py", "weight.requires_grad and torch.is_grad_enabled()", "False", _KERNELS),
    _in("offload/runtime/kernel_memory.py", "_STEP_BYTES if gave_much else 2 * self._step_bytes", "_STEP_BYTES", _KERNELS),
    # On a card.
    _in("storage/devices/cuda.py", "for event in dict.fromkeys(after):", "for event in ():", *CARD, "tests/mutations", "tests/gpu/test_cuda.py"),
    _in("offload/runtime/executor.py", "return max(uses, key=lambda use: use[0])[1] if uses else None", "return None", *CARD, "tests/gpu/test_cuda.py", "tests/pretended"),
    _in("storage/pages/pool.py", "            self._pool.device.wait(self.copied)", "            pass", *CARD, "tests/gpu/test_kv.py"),
    _in("storage/pages/pool.py", "self._end(after or self._pool.device.record())", "self._end(None)", *CARD, "tests/gpu/test_kv.py"),
]  # fmt: skip
