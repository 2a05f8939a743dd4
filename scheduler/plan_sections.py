"""The sections of a plan: one a subject, plain values."""

from dataclasses import dataclass, fields

from offload.scheduler.model_spec import PlacedBlock
from offload.storage.blocks import BlockKey


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """The bytes of one block on each tier, and how it is stored.

    Attributes:
        stored_bytes: read from disk each time it is loaded from there.
        host_bytes: taken of CPU memory where the block lives there, beside a device with memory of its own.
        slot_bytes: taken of the slots while it is streamed, over-read included.
        resident_bytes: taken of the device where it stays there.
        codec: how it is encoded on disk and in CPU memory; `none` for plain tensors.
        decode_seconds: of decoding it into a slot on the CPU, once.
    """

    key: BlockKey
    stored_bytes: int
    host_bytes: int
    slot_bytes: int
    resident_bytes: int
    codec: str = "none"
    decode_seconds: float = 0.0

    @classmethod
    def of(cls, block: PlacedBlock) -> "BlockPlan":
        """Take over what the planner knows of a block."""
        return cls(**{field.name: getattr(block, field.name) for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class WeightsPlan:
    """Where each block of weights lives and how it is streamed.

    Attributes:
        resident: blocks that stay on the device.
        streamed: blocks that pass through the slots, in the order of the model.
        in_host_memory: those of them that come from CPU memory, where encoded ones are in their stored form; the others come
            from disk. Where the CPU is the device, only encoded ones.
        row_fetched: embeddings of which only the rows in use are read.
        tables_in_host_memory: those of them whose rows come from CPU memory; the others' come from disk.
        computed_on_host: blocks that live in CPU memory and are computed there; their weights never cross the link.
        cpu_gpu_split: of `in_host_memory`, the layers that device and CPU compute together.
        cpu_percent: of the rows of their products, what the CPU computes.
        slot_bytes: size of one slot; a larger block takes several neighbouring ones.
        slot_count: how many.
        staging_count: host buffers between disk and a device with memory of its own, each as large as a block.
        always_resident_bytes: parameters outside of all blocks, and buffers.
        resident_bytes: of all resident blocks.
        encoded_bytes: of blocks that are kept in their stored form, in the memory of a device that is the CPU.
        streamed_bytes: what crosses the link in one pass over all blocks.
        blocks: the bytes of each block.
    """

    resident: tuple[BlockKey, ...] = ()
    streamed: tuple[BlockKey, ...] = ()
    in_host_memory: tuple[BlockKey, ...] = ()
    row_fetched: tuple[BlockKey, ...] = ()
    tables_in_host_memory: tuple[BlockKey, ...] = ()
    computed_on_host: tuple[BlockKey, ...] = ()
    cpu_gpu_split: tuple[BlockKey, ...] = ()
    cpu_percent: int = 0
    slot_bytes: int = 0
    slot_count: int = 0
    staging_count: int = 0
    always_resident_bytes: int = 0
    resident_bytes: int = 0
    encoded_bytes: int = 0
    streamed_bytes: int = 0
    blocks: tuple[BlockPlan, ...] = ()

    @property
    def held_in_host_memory(self) -> tuple[BlockKey, ...]:
        """All blocks that live in CPU memory beside a device."""
        return (*self.in_host_memory, *self.tables_in_host_memory, *self.computed_on_host)


@dataclass(frozen=True, slots=True)
class ExpertsPlan:
    """Device memory for experts that are cached one by one.

    Attributes:
        slots: experts that it has room for; 0 where experts are parts of their layers.
        slot_bytes: of one.
        in_host_memory: how many experts come from CPU memory; the others come from disk.
        staging_count: host buffers between disk and a device with memory of its own.
    """

    slots: int = 0
    slot_bytes: int = 0
    in_host_memory: int = 0
    staging_count: int = 0


@dataclass(frozen=True, slots=True)
class KvPlan:
    """Where keys and values live.

    Attributes:
        reserved_bytes: device memory kept free for the KV cache.
        memory_bytes: of these, what pages of keys and values have; 0 where all of them stay on the device.
        segments: whether attention reads the pages piece by piece.
        host_bytes: CPU memory for pages beside a device with memory of its own; the rest goes to disk.
        stored_percent: of a token's bytes, what it takes in a full page.
        resident_bytes: of full pages, those that stay on the device.
        state_offload: whether the state of layers that do not keep all tokens is in pages too.
    """

    reserved_bytes: int = 0
    memory_bytes: int = 0
    segments: bool = False
    host_bytes: int = 0
    stored_percent: int = 100
    resident_bytes: int = 0
    state_offload: bool = False


@dataclass(frozen=True, slots=True)
class SplitsPlan:
    """Into what passes are split; 0 where they are not.

    Attributes:
        micro_batch: sequences of a prompt that a layer computes at once.
        decode_micro_batch: the same in decode, where a sequence holds less.
        prefill_chunk: tokens of a prompt in one pass.
    """

    micro_batch: int = 0
    decode_micro_batch: int = 0
    prefill_chunk: int = 0
