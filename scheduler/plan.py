"""What was decided, frozen."""

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from scheduler.model_spec import ModelSpec, Workload
from storage.blocks import BlockKey
from storage.errors import PlanError, gib

_BLOCK_LISTS = ("resident", "streamed", "in_host_memory", "gathered", "computed_on_host")


@dataclass(frozen=True, slots=True)
class Plan:
    """Where each block lives and how the rest is streamed.

    Attributes:
        resident: blocks that stay on the device.
        streamed: blocks that pass through the slots, in the order of the model.
        in_host_memory: those of them that come from CPU memory; the others come from disk.
        gathered: embeddings of which only the rows in use are read.
        computed_on_host: blocks that live in CPU memory and are computed there; their weights never cross the link.
        slot_bytes: size of one slot; a larger block takes several neighbouring ones.
        slot_count: how many.
        staging_count: host buffers between disk and a device with memory of its own, each as large as a block.
        kv_bytes: device memory kept free for the KV cache.
        activation_bytes: device memory kept free for temporaries.
        pinned_bytes: parameters outside of all blocks.
        streamed_bytes: what crosses the link in one pass over all blocks.
    """

    resident: tuple[BlockKey, ...]
    streamed: tuple[BlockKey, ...]
    in_host_memory: tuple[BlockKey, ...]
    gathered: tuple[BlockKey, ...]
    slot_bytes: int
    slot_count: int
    staging_count: int
    kv_bytes: int
    activation_bytes: int
    pinned_bytes: int
    resident_bytes: int
    streamed_bytes: int
    computed_on_host: tuple[BlockKey, ...] = ()

    @property
    def arena_bytes(self) -> int:
        return self.slot_bytes * self.slot_count

    @property
    def device_bytes(self) -> int:
        """All that the plan takes of the device's budget."""
        return self.pinned_bytes + self.resident_bytes + self.arena_bytes + self.kv_bytes + self.activation_bytes

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

    def completed(self, model: ModelSpec, workload: Workload) -> "Plan":
        """The same placement, with the sums that follow from it."""
        blocks = {block.key: block for block in model.blocks}
        return replace(
            self,
            kv_bytes=workload.kv_bytes(model),
            activation_bytes=workload.activation_bytes(model),
            pinned_bytes=model.pinned_bytes,
            resident_bytes=sum(blocks[key].resident_bytes for key in self.resident),
            streamed_bytes=sum(blocks[key].streamed_bytes for key in self.streamed),
        )

    def check(self, model: ModelSpec) -> None:
        """Raise PlanError unless this is a plan for `model`: each block in one place, slots that hold what is streamed."""
        places = (*self.resident, *self.streamed, *self.gathered, *self.computed_on_host)
        blocks = {block.key: block for block in model.blocks}
        if unknown := sorted(set(places) - set(blocks)):
            raise PlanError(f"the plan places {unknown[0]}, which the model does not have: it was made for another model")
        if absent := [key for key in blocks if key not in places]:
            raise PlanError(f"the plan does not place {absent[0]}, which the model has")
        if twice := sorted({key for key in places if places.count(key) > 1}):
            raise PlanError(f"the plan places {twice[0]} twice")
        if stray := sorted(set(self.in_host_memory) - set(self.streamed)):
            raise PlanError(f"the plan streams {stray[0]} from CPU memory, and it is not among the streamed blocks")
        for window in model.windows:
            streamed = [blocks[key].slot_bytes for key in window if key in self.streamed]
            needed = sum(-(-size // self.slot_bytes) for size in streamed) if self.slot_bytes else len(streamed)
            if needed > self.slot_count:
                raise PlanError(
                    f"the plan has {self.slot_count} slots of {gib(self.slot_bytes)}; {window[0]} takes {needed} at once"
                )


def _checked(name: str, value: Any) -> Any:
    if name in _BLOCK_LISTS:
        if not isinstance(value, list) or not all(isinstance(key, str) for key in value):
            raise PlanError(f"{name} in the plan must be a list of block names, not {value!r}")
        return tuple(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise PlanError(f"{name} in the plan must be a count, not {value!r}")
    return value
