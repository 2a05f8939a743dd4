"""What was decided, frozen."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar

from offload.scheduler.kv_pages import PagedKv
from offload.scheduler.model_spec import ModelSpec, PlacedBlock, Workload
from offload.scheduler.plan_json import SCHEMA, SCHEMA_1, sections_from_json
from offload.scheduler.plan_sections import BlockPlan, ExpertsPlan, KvPlan, SplitsPlan, WeightsPlan
from offload.scheduler.renamed import Renamed
from offload.storage.blocks import BlockKey
from offload.storage.errors import PlanError, counted, gib


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
class Plan(Renamed):
    """What lives where and how the rest moves.

    Attributes:
        activation_bytes: device memory kept free for activations.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {
        old: f"{section}.{new}" for section, names in SCHEMA_1.items() for old, new in names.items()
    }

    weights: WeightsPlan
    experts: ExpertsPlan = field(default_factory=ExpertsPlan)
    kv: KvPlan = field(default_factory=KvPlan)
    splits: SplitsPlan = field(default_factory=SplitsPlan)
    activation_bytes: int = 0

    @property
    def host_compute(self) -> HostCompute:
        return HostCompute(
            frozenset(self.weights.computed_on_host), frozenset(self.weights.cpu_gpu_split), self.weights.cpu_percent
        )

    @property
    def rounds(self) -> tuple[str, ...]:
        """What is computed in another shape or elsewhere than the plain model does, each in a few words."""
        said = []
        if self.weights.computed_on_host:
            said.append(f"{counted(len(self.weights.computed_on_host), 'layer is', 'layers are')} computed on the CPU")
        if self.weights.cpu_gpu_split:
            said.append(
                f"{counted(len(self.weights.cpu_gpu_split), 'layer is', 'layers are')} computed by device and CPU together "
                f"({self.weights.cpu_percent}% by the CPU)"
            )
        if self.splits.micro_batch:
            decode = f", {self.splits.decode_micro_batch or 'all'} of them in decode"
            said.append(f"a layer computes {self.splits.micro_batch} sequences at once{decode}")
        if self.splits.prefill_chunk:
            said.append(f"a prompt is computed {self.splits.prefill_chunk} tokens at once")
        if self.kv.segments:
            said.append("attention reads the KV cache piece by piece")
        return tuple(said)

    @property
    def arena_bytes(self) -> int:
        return self.weights.slot_bytes * self.weights.slot_count

    @property
    def expert_bytes(self) -> int:
        return self.experts.slots * self.experts.slot_bytes

    @property
    def device_bytes(self) -> int:
        """All that the plan takes of the device's budget."""
        held = self.weights.always_resident_bytes + self.weights.resident_bytes + self.weights.encoded_bytes
        return held + self.arena_bytes + self.expert_bytes + self.kv.reserved_bytes + self.activation_bytes

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA} | asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan of this schema or of schema 1. Raises PlanError for what `to_json` did not write."""
        return cls(**sections_from_json(text))

    def parts_of(self, model: ModelSpec) -> dict[BlockKey, PlacedBlock]:
        """The blocks, with the device's part of those that are divided."""
        cpu_gpu_split = set(self.weights.cpu_gpu_split)
        return {
            block.key: block.device_part(self.weights.cpu_percent) if block.key in cpu_gpu_split else block
            for block in model.blocks
        }

    def parts(self, batch_size: int, tokens: int) -> int:
        """Into which a layer's batch is taken apart in a pass of `tokens` of each sequence."""
        at_once = self.splits.micro_batch if tokens > 1 else self.splits.decode_micro_batch
        return -(-batch_size // at_once) if at_once else 1

    def asked(self, workload: Workload) -> Workload:
        """The workload in the parts that this plan takes it apart into."""
        paged = None
        if self.kv.memory_bytes:
            paged = PagedKv(self.kv.memory_bytes, self.kv.segments, self.kv.stored_percent, self.kv.state_offload)
        return replace(workload, micro_batch=self.splits.micro_batch, prefill_chunk=self.splits.prefill_chunk, paged=paged)

    def kept_as(self, workload: Workload) -> Workload:
        """The workload with keys and values kept as by this plan, and nothing taken apart."""
        return replace(workload, paged=self.asked(workload).paged)

    def completed(self, model: ModelSpec, workload: Workload, own_memory: bool) -> "Plan":
        """The same placement, with the sums that follow from it.

        Args:
            own_memory: the device's memory is not the CPU's.
        """
        blocks, workload = self.parts_of(model), self.asked(workload)
        kept = [] if own_memory else self.weights.in_host_memory
        weights = replace(
            self.weights,
            always_resident_bytes=model.always_resident_bytes,
            resident_bytes=sum(blocks[key].resident_bytes for key in self.weights.resident),
            encoded_bytes=sum(blocks[key].encoded_bytes for key in kept),
            streamed_bytes=sum(blocks[key].stored_bytes for key in self.weights.streamed if key not in kept),
            blocks=tuple(BlockPlan.of(block) for block in model.blocks),
        )
        return replace(
            self,
            weights=weights,
            experts=replace(self.experts, slot_bytes=model.experts.slot_bytes if model.experts is not None else 0),
            kv=replace(self.kv, reserved_bytes=workload.kv_bytes(model)),
            splits=replace(self.splits, decode_micro_batch=workload.decode_micro_batch(model)),
            activation_bytes=workload.activation_bytes(model),
        )

    def check(self, model: ModelSpec) -> None:
        """Raise PlanError unless this is a plan for `model`: each block in one place, slots that hold what is streamed."""
        places = (*self.weights.resident, *self.weights.streamed, *self.weights.row_fetched, *self.weights.computed_on_host)
        blocks = self.parts_of(model)
        if unknown := sorted(set(places) - set(blocks)):
            raise PlanError(f"the plan places {unknown[0]}, which the model does not have: it was made for another model")
        if absent := [key for key in blocks if key not in places]:
            raise PlanError(f"the plan does not place {absent[0]}, which the model has")
        if twice := sorted({key for key in places if places.count(key) > 1}):
            raise PlanError(f"the plan places {twice[0]} twice")
        if stray := sorted(set(self.weights.in_host_memory) - set(self.weights.streamed)):
            raise PlanError(f"the plan streams {stray[0]} from CPU memory, and it is not among the streamed blocks")
        if stray := sorted(set(self.weights.tables_in_host_memory) - set(self.weights.row_fetched)):
            raise PlanError(f"the plan takes the rows of {stray[0]} from CPU memory, and it is not among those read by row")
        if stray := sorted(set(self.weights.cpu_gpu_split) - set(self.weights.in_host_memory)):
            raise PlanError(f"the plan divides {stray[0]}, and it is not among the blocks that are streamed from CPU memory")
        if solid := [key for key in self.weights.cpu_gpu_split if not blocks[key].divisible]:
            raise PlanError(f"the plan divides {solid[0]}, which has no plain products to divide")
        if self.weights.cpu_percent > 99 or (self.weights.cpu_gpu_split and not self.weights.cpu_percent):
            raise PlanError(
                f"cpu_percent in the plan is {self.weights.cpu_percent}; where layers are divided it is from 1 to 99"
            )
        if model.experts is None and self.experts.slots:
            raise PlanError("the plan has slots for single experts, and the model's experts are not brought one by one")
        if model.experts is not None and not self.experts.slots:
            raise PlanError("the plan has no slot for experts, which are brought one by one: expert_slots must be at least 1")
        if self.kv.memory_bytes and (self.splits.micro_batch or self.weights.computed_on_host or model.kv is None):
            raise PlanError(
                "the plan keeps keys and values in pages (kv_memory_bytes), and computes layers on the CPU or their batch in "
                "parts, or the model has no layers that keep all tokens: one of them must go"
            )
        for keys in model.co_resident_blocks:
            streamed = [blocks[key].slot_bytes for key in keys if key in self.weights.streamed]
            needed = sum(-(-size // self.weights.slot_bytes) for size in streamed) if self.weights.slot_bytes else len(streamed)
            if needed > self.weights.slot_count:
                raise PlanError(
                    f"the plan has {self.weights.slot_count} slots of {gib(self.weights.slot_bytes)}; {keys[0]} "
                    f"takes {needed} at once"
                )
