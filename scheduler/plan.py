"""What was decided, frozen."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from storage.blocks import BlockKey


@dataclass(frozen=True, slots=True)
class Plan:
    """Where each block lives and how the rest is streamed.

    Attributes:
        resident: blocks that stay on the device.
        streamed: blocks that pass through the slots, in the order of the model.
        in_host_memory: those of them that come from CPU memory; the others come from disk.
        gathered: embeddings of which only the rows in use are read.
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
        fields: dict[str, Any] = json.loads(text)
        for name in ("resident", "streamed", "in_host_memory", "gathered"):
            fields[name] = tuple(fields[name])
        return cls(**fields)
