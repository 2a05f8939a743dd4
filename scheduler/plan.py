"""What was decided, frozen."""

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from offload.scheduler.kv_pages import PagedKv
from offload.scheduler.model_spec import ModelSpec, PlacedBlock, Workload
from offload.storage.blocks import BlockKey
from offload.storage.errors import PlanError, gib

_BLOCK_LISTS = ("resident", "streamed", "in_host_memory", "row_fetched", "computed_on_host", "cpu_gpu_split")


@dataclass(frozen=True, slots=True)
class HostCompute:
    """What the CPU computes beside a device.

    Attributes:
        whole: layers that it computes alone.
        shared: layers of which it computes `percent` of the rows of each product, and the device the others
            (HeteGen, arXiv 2403.01164).
    """

    whole: frozenset[BlockKey] = frozenset()
    shared: frozenset[BlockKey] = frozenset()
    percent: int = 0

    def __bool__(self) -> bool:
        return bool(self.whole or self.shared)


DEVICE_ALONE = HostCompute()


@dataclass(frozen=True, slots=True)
class Plan:
    """Where each block lives and how the rest is streamed.

    Attributes:
        resident: blocks that stay on the device.
        streamed: blocks that pass through the slots, in the order of the model.
        in_host_memory: those of them that come from CPU memory; the others come from disk.
        row_fetched: embeddings of which only the rows in use are read.
        computed_on_host: blocks that live in CPU memory and are computed there; their weights never cross the link.
        cpu_gpu_split: of `in_host_memory`, the layers that device and CPU compute together.
        cpu_percent: of the rows of their products, what the CPU computes.
        micro_batch: sequences of a prompt that a layer computes at once; 0 for all.
        decode_micro_batch: the same in decode, where a sequence holds less; 0 for all.
        prefill_chunk: tokens of a prompt in one pass; 0 for all.
        slot_bytes: size of one slot; a larger block takes several neighbouring ones.
        slot_count: how many.
        staging_count: host buffers between disk and a device with memory of its own, each as large as a block.
        kv_bytes: device memory kept free for the KV cache.
        activation_bytes: device memory kept free for activations.
        always_resident_bytes: parameters outside of all blocks.
        streamed_bytes: what crosses the link in one pass over all blocks.
        expert_slots: device memory for so many experts, where they are brought one by one.
        expert_slot_bytes: of one of these.
        experts_in_host_memory: how many come from CPU memory; the others come from disk.
        expert_staging_count: host buffers between disk and a device with memory of its own, for experts.
        kv_memory_bytes: of `kv_bytes`, what pages of keys and values have; 0 where all of them stay on the device.
        kv_segments: whether attention reads these page after page.
        kv_host_bytes: CPU memory for pages beside a device with memory of its own; the rest goes to disk.
        kv_stored_percent: of a token's bytes, what it takes in a full page.
        kv_resident_bytes: of full pages, those that stay on the device.
        kv_state_offload: whether the state of layers that do not keep all tokens is in pages too.
    """

    resident: tuple[BlockKey, ...]
    streamed: tuple[BlockKey, ...]
    in_host_memory: tuple[BlockKey, ...]
    row_fetched: tuple[BlockKey, ...]
    slot_bytes: int
    slot_count: int
    staging_count: int
    kv_bytes: int
    activation_bytes: int
    always_resident_bytes: int
    resident_bytes: int
    streamed_bytes: int
    computed_on_host: tuple[BlockKey, ...] = ()
    cpu_gpu_split: tuple[BlockKey, ...] = ()
    cpu_percent: int = 0
    micro_batch: int = 0
    decode_micro_batch: int = 0
    prefill_chunk: int = 0
    expert_slots: int = 0
    expert_slot_bytes: int = 0
    experts_in_host_memory: int = 0
    expert_staging_count: int = 0
    kv_memory_bytes: int = 0
    kv_segments: bool = False
    kv_host_bytes: int = 0
    kv_stored_percent: int = 100
    kv_resident_bytes: int = 0
    kv_state_offload: bool = False

    @property
    def host_compute(self) -> HostCompute:
        return HostCompute(frozenset(self.computed_on_host), frozenset(self.cpu_gpu_split), self.cpu_percent)

    @property
    def rounds(self) -> tuple[str, ...]:
        """What is computed in another shape or elsewhere than the plain model does, each in a few words."""
        said = []
        if self.computed_on_host:
            said.append(f"{len(self.computed_on_host)} layers are computed on the CPU")
        if self.cpu_gpu_split:
            said.append(
                f"{len(self.cpu_gpu_split)} layers are computed by device and CPU together ({self.cpu_percent}% by the CPU)"
            )
        if self.micro_batch:
            decode = f", {self.decode_micro_batch or 'all'} of them in decode"
            said.append(f"a layer computes {self.micro_batch} sequences at once{decode}")
        if self.prefill_chunk:
            said.append(f"a prompt is computed {self.prefill_chunk} tokens at once")
        if self.kv_segments:
            said.append("attention reads the KV cache piece by piece")
        return tuple(said)

    @property
    def arena_bytes(self) -> int:
        return self.slot_bytes * self.slot_count

    @property
    def expert_bytes(self) -> int:
        return self.expert_slots * self.expert_slot_bytes

    @property
    def device_bytes(self) -> int:
        """All that the plan takes of the device's budget."""
        weights = self.always_resident_bytes + self.resident_bytes + self.arena_bytes + self.expert_bytes
        return weights + self.kv_bytes + self.activation_bytes

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Raises PlanError for what `to_json` did not write."""
        try:
            content: Any = json.loads(text)
        except ValueError as error:
            raise PlanError(f"the plan is not JSON ({error})") from error
        known = {field.name: field for field in fields(cls)}
        if not isinstance(content, dict) or set(content) - set(known):
            wrong = sorted(set(content) - set(known)) if isinstance(content, dict) else ["its form"]
            raise PlanError(f"the plan has what is not known to one: {', '.join(wrong)}; known: {', '.join(known)}")
        if missing := sorted(set(known) - set(content)):
            raise PlanError(f"the plan lacks {', '.join(missing)}")
        return cls(**{name: _checked(name, value) for name, value in content.items()})

    def parts_of(self, model: ModelSpec) -> dict[BlockKey, PlacedBlock]:
        """The blocks, with the device's part of those that are divided."""
        cpu_gpu_split = set(self.cpu_gpu_split)
        return {
            block.key: block.device_part(self.cpu_percent) if block.key in cpu_gpu_split else block for block in model.blocks
        }

    def parts(self, batch_size: int, tokens: int) -> int:
        """Into which a layer's batch is taken apart in a pass of `tokens` of each sequence."""
        at_once = self.micro_batch if tokens > 1 else self.decode_micro_batch
        return -(-batch_size // at_once) if at_once else 1

    def asked(self, workload: Workload) -> Workload:
        """The workload in the parts that this plan takes it apart into."""
        paged = None
        if self.kv_memory_bytes:
            paged = PagedKv(self.kv_memory_bytes, self.kv_segments, self.kv_stored_percent, self.kv_state_offload)
        return replace(workload, micro_batch=self.micro_batch, prefill_chunk=self.prefill_chunk, paged=paged)

    def kept_as(self, workload: Workload) -> Workload:
        """The workload with keys and values kept as by this plan, and nothing taken apart."""
        return replace(workload, paged=self.asked(workload).paged)

    def completed(self, model: ModelSpec, workload: Workload) -> "Plan":
        """The same placement, with the sums that follow from it."""
        blocks, workload = self.parts_of(model), self.asked(workload)
        return replace(
            self,
            kv_bytes=workload.kv_bytes(model),
            activation_bytes=workload.activation_bytes(model),
            always_resident_bytes=model.always_resident_bytes,
            resident_bytes=sum(blocks[key].resident_bytes for key in self.resident),
            streamed_bytes=sum(blocks[key].streamed_bytes for key in self.streamed),
            decode_micro_batch=workload.decode_micro_batch(model),
            expert_slot_bytes=model.experts.slot_bytes if model.experts is not None else 0,
        )

    def check(self, model: ModelSpec) -> None:
        """Raise PlanError unless this is a plan for `model`: each block in one place, slots that hold what is streamed."""
        places = (*self.resident, *self.streamed, *self.row_fetched, *self.computed_on_host)
        blocks = self.parts_of(model)
        if unknown := sorted(set(places) - set(blocks)):
            raise PlanError(f"the plan places {unknown[0]}, which the model does not have: it was made for another model")
        if absent := [key for key in blocks if key not in places]:
            raise PlanError(f"the plan does not place {absent[0]}, which the model has")
        if twice := sorted({key for key in places if places.count(key) > 1}):
            raise PlanError(f"the plan places {twice[0]} twice")
        if stray := sorted(set(self.in_host_memory) - set(self.streamed)):
            raise PlanError(f"the plan streams {stray[0]} from CPU memory, and it is not among the streamed blocks")
        if stray := sorted(set(self.cpu_gpu_split) - set(self.in_host_memory)):
            raise PlanError(f"the plan divides {stray[0]}, and it is not among the blocks that are streamed from CPU memory")
        if solid := [key for key in self.cpu_gpu_split if not blocks[key].divisible]:
            raise PlanError(f"the plan divides {solid[0]}, which has no plain products to divide")
        if self.cpu_percent > 99 or (self.cpu_gpu_split and not self.cpu_percent):
            raise PlanError(f"cpu_percent in the plan is {self.cpu_percent}; where layers are divided it is from 1 to 99")
        if model.experts is None and self.expert_slots:
            raise PlanError("the plan has slots for single experts, and the model's experts are not brought one by one")
        if model.experts is not None and not self.expert_slots:
            raise PlanError("the plan has no slot for experts, which are brought one by one: expert_slots must be at least 1")
        if self.kv_memory_bytes and (self.micro_batch or self.computed_on_host or model.kv is None):
            raise PlanError(
                "the plan keeps keys and values in pages (kv_memory_bytes), and computes layers on the CPU or their batch in "
                "parts, or the model has no layers that keep all tokens: one of them must go"
            )
        for keys in model.co_resident_blocks:
            streamed = [blocks[key].slot_bytes for key in keys if key in self.streamed]
            needed = sum(-(-size // self.slot_bytes) for size in streamed) if self.slot_bytes else len(streamed)
            if needed > self.slot_count:
                raise PlanError(
                    f"the plan has {self.slot_count} slots of {gib(self.slot_bytes)}; {keys[0]} takes {needed} at once"
                )


def _checked(name: str, value: Any) -> Any:
    if name in _BLOCK_LISTS:
        if not isinstance(value, list) or not all(isinstance(key, str) for key in value):
            raise PlanError(f"{name} in the plan must be a list of block names, not {value!r}")
        return tuple(value)
    if name in ("kv_segments", "kv_state_offload"):
        if not isinstance(value, bool):
            raise PlanError(f"{name} in the plan must be true or false, not {value!r}")
        return value
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise PlanError(f"{name} in the plan must be a count, not {value!r}")
    return value
