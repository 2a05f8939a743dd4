"""What the planner knows of a model: its blocks, and which of them are in use together."""

from dataclasses import dataclass
from enum import Enum

from storage.blocks import BlockKey


class BlockRole(Enum):
    """What a block is to the model, as far as placing it is concerned."""

    LAYER = "layer"
    """One of a repeated list."""
    TABLE = "table"
    """An embedding that only looks rows up: streamed, it is gathered row by row and needs no slot."""
    OTHER = "other"
    """A head, a norm, a projection."""


@dataclass(frozen=True, slots=True)
class PlacedBlock:
    """A block as the planner sees it.

    Attributes:
        resident_bytes: what it takes on the device when it stays there.
        slot_bytes: what it takes in the slots while it is streamed, over-read included.
        streamed_bytes: what crosses the link each time it is streamed.
    """

    key: BlockKey
    role: BlockRole
    resident_bytes: int
    slot_bytes: int
    streamed_bytes: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model to be placed.

    Attributes:
        blocks: in the order in which the model runs them, as far as its structure tells.
        windows: the sets of blocks that are in use at the same moment.
        pinned_bytes: buffers, and parameters that no block holds; they always stay on the device.
        kv_bytes_per_token: of one sequence; 0 if the model keeps no KV cache or its config does not tell.
        state_bytes_per_sequence: of state-space and linear-attention layers, whatever the sequence's length.
        activation_bytes_per_token: the largest block's temporaries, for each token of a pass.
        logits_bytes_per_sequence: what the head and the sampling hold, for each sequence of a pass.
    """

    blocks: tuple[PlacedBlock, ...]
    windows: tuple[tuple[BlockKey, ...], ...]
    pinned_bytes: int = 0
    kv_bytes_per_token: int = 0
    state_bytes_per_sequence: int = 0
    activation_bytes_per_token: int = 0
    logits_bytes_per_sequence: int = 0

    @property
    def resident_bytes(self) -> int:
        return self.pinned_bytes + sum(block.resident_bytes for block in self.blocks)


@dataclass(frozen=True, slots=True)
class Workload:
    """What will be asked of the model.

    Attributes:
        batch_size: sequences in one pass, beams counted.
        total_tokens: of one sequence, prompt and answer.
        pass_tokens: of one sequence in the longest pass: the prompt.
        least_kv_bytes: what the KV cache was seen to take, where it is more than the formula says.
    """

    batch_size: int
    total_tokens: int
    pass_tokens: int
    least_kv_bytes: int = 0

    def kv_bytes(self, model: ModelSpec) -> int:
        sequence_bytes = model.state_bytes_per_sequence + self.total_tokens * model.kv_bytes_per_token
        return max(self.least_kv_bytes, self.batch_size * sequence_bytes)

    def activation_bytes(self, model: ModelSpec) -> int:
        tokens = self.batch_size * self.pass_tokens
        return tokens * model.activation_bytes_per_token + self.batch_size * model.logits_bytes_per_sequence
