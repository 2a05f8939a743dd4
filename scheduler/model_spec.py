"""What the planner knows of a model: its blocks, and which of them are in use together."""

from dataclasses import dataclass, replace
from enum import Enum

from offload.scheduler.kv_pages import KvShape, PagedKv
from offload.storage.blocks import TENSOR_ALIGNMENT_BYTES, BlockKey

_OFFLOADED_STATES_AT_ONCE = 2
"""Layers whose state is on the device, where it is put away: the one that computes, and the one before it."""


class BlockRole(Enum):
    """What a block is to the model, as far as placing it is concerned."""

    LAYER = "layer"
    """One of a repeated list."""
    TABLE = "table"
    """An embedding that only looks rows up: streamed, it is gathered row by row and needs no slot."""
    OTHER = "other"
    """A head, a norm, a projection."""


@dataclass(frozen=True, slots=True)
class DivisibleWeight:
    """The weight of a product, whose rows two processors can share.

    Attributes:
        rows: outputs of the product.
        row_bytes: of one row.
        element_bytes: of one number.
    """

    rows: int
    row_bytes: int
    element_bytes: int

    def host_rows(self, percent: int) -> int:
        """The last rows, which the CPU computes with."""
        return self.rows * percent // 100


@dataclass(frozen=True, slots=True)
class PlacedBlock:
    """A block as the planner sees it.

    Attributes:
        resident_bytes: what it takes on the device when it stays there.
        slot_bytes: what it takes in the slots while it is streamed, over-read included.
        stored_bytes: what is read from disk, or crosses the link, each time it is streamed.
        codec: how it is encoded there; `none` for plain tensors.
        decode_seconds: of decoding it into a slot on the CPU, once.
        encoded_bytes: what it takes of CPU memory in its stored form, where that is encoded; 0 where it is not.
        divisible: its weights that the device and the CPU can compute with together.
    """

    key: BlockKey
    role: BlockRole
    resident_bytes: int
    slot_bytes: int
    stored_bytes: int
    divisible: tuple[DivisibleWeight, ...] = ()
    codec: str = "none"
    decode_seconds: float = 0.0
    encoded_bytes: int = 0

    @property
    def host_bytes(self) -> int:
        """What it takes of CPU memory where it is streamed from there: laid out as in a slot, or in its stored form."""
        return self.encoded_bytes or self.slot_bytes

    def device_part(self, cpu_percent: int) -> "PlacedBlock":
        """What crosses the link where the CPU computes with `cpu_percent` of the divisible weights' rows."""
        host_bytes = sum(weight.host_rows(cpu_percent) * weight.row_bytes for weight in self.divisible)
        # Each weight that is left begins aligned again.
        slot_bytes = self.slot_bytes - host_bytes + TENSOR_ALIGNMENT_BYTES * len(self.divisible)
        stored_bytes = self.resident_bytes if self.encoded_bytes else self.stored_bytes
        plain = replace(self, codec="none", decode_seconds=0.0, encoded_bytes=0)
        return replace(plain, slot_bytes=slot_bytes, stored_bytes=stored_bytes - host_bytes)


@dataclass(frozen=True, slots=True)
class ActivationSizes:
    """What a pass holds beside weights and KV cache, by what it grows with.

    Attributes:
        token_bytes: for each token of the pass, of each sequence.
        context_bytes: for each token that is attended to, of each sequence: keys and values repeated, above all.
        between_bytes: of `token_bytes`, what lies between the layers (hidden states), which micro-batches do not make less.
        state_bytes: what recurrent layers keep of a sequence, whatever its length; None where it was not counted.
    """

    token_bytes: int = 0
    context_bytes: int = 0
    between_bytes: int = 0
    state_bytes: int | None = None


def expected_distinct_experts(rows: int, count: int, chosen: int) -> float:
    """How many of `count` experts so many tokens ask for, if each chooses `chosen` of them by chance."""
    return count * (1.0 - (1.0 - chosen / count) ** rows)


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """The experts of a model that are brought one by one.

    Attributes:
        layers: keys of the modules that hold them.
        counts: how many each of them holds.
        chosen: by one token in one layer.
        expert_bytes: of one expert, by layer: what crosses the link.
        slot_bytes: of the device memory that one takes, whichever it is.
    """

    layers: tuple[BlockKey, ...]
    counts: tuple[int, ...]
    chosen: int
    expert_bytes: tuple[int, ...]
    slot_bytes: int

    @property
    def total(self) -> int:
        """Experts of all layers."""
        return sum(self.counts)

    @property
    def nbytes(self) -> int:
        return sum(count * size for count, size in zip(self.counts, self.expert_bytes, strict=True))

    def hit_rate(self, slots: int) -> float:
        """The share of a new token's choices to expect in so many slots: they repeat, far more than chance would have it.

        A curve through what was found on real routings (docs/experts.md); a model may do better or worse.
        """
        return min(1.0, float((slots / self.total) ** 0.25)) if slots else 0.0

    def needed(self, rows: int, layer: int) -> float:
        """Experts of a layer that a pass of so many tokens asks for, if all were equally likely."""
        return expected_distinct_experts(rows, self.counts[layer], self.chosen)

    @property
    def token_slots(self) -> int:
        """Those that one token uses in all layers."""
        return len(self.layers) * self.chosen

    @property
    def least_slots(self) -> int:
        """Those that one token uses in one layer."""
        return min(self.chosen, self.total)

    @property
    def least_bytes(self) -> int:
        return self.least_slots * self.slot_bytes


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model to be placed.

    Attributes:
        blocks: in the order in which the model runs them, as far as its structure tells.
        co_resident_blocks: the sets of blocks that are in use at the same moment.
        pinned_bytes: buffers, and parameters that no block holds; they always stay on the device.
        kv_bytes_per_token: of one sequence, in the layers that keep all tokens; 0 if the model keeps no KV cache or its config
            does not tell.
        state_bytes_per_sequence: of state-space and linear-attention layers, whatever the sequence's length.
        temporaries: what a pass holds beside weights and KV cache.
        logits_bytes_per_sequence: what the head and the sampling hold, for each sequence of a pass.
        experts: those that are brought one by one, beside the blocks; None if they are part of them, or there are none.
        kv_windows: (tokens, bytes a token) of the layers that keep so many tokens at most.
        kv: of the layers that keep all tokens, those that can be kept in pages; None if there are none.
        workspace_bytes: what the device's libraries keep for their kernels, whatever the model.
    """

    blocks: tuple[PlacedBlock, ...]
    co_resident_blocks: tuple[tuple[BlockKey, ...], ...]
    always_resident_bytes: int = 0
    kv_bytes_per_token: int = 0
    state_bytes_per_sequence: int = 0
    activations: ActivationSizes = ActivationSizes()
    logits_bytes_per_sequence: int = 0
    experts: ExpertsSpec | None = None
    kv_sliding_windows: tuple[tuple[int, int], ...] = ()
    kv: KvShape | None = None
    workspace_bytes: int = 0

    @property
    def layers(self) -> tuple[PlacedBlock, ...]:
        return tuple(block for block in self.blocks if block.role is BlockRole.LAYER)

    @property
    def resident_bytes(self) -> int:
        return self.always_resident_bytes + sum(block.resident_bytes for block in self.blocks)


@dataclass(frozen=True, slots=True)
class Workload:
    """What will be asked of the model.

    Attributes:
        batch_size: sequences in one pass, beams counted.
        total_tokens: of one sequence, prompt and answer.
        pass_tokens: of one sequence in the longest pass: the prompt.
        least_kv_bytes: what the KV cache was seen to take, where it is more than the formula says.
        micro_batch: sequences of a prompt that a layer computes at once, one such part after another; 0 for all.
        prefill_chunk: tokens of the prompt that are computed at once, one such pass after another; 0 for all.
        context_tokens: that are attended to, where they are more than `total_tokens`.
        paged: keys and values are kept in pages, most of them on lower tiers; None: all on the device.
    """

    batch_size: int
    total_tokens: int
    pass_tokens: int
    least_kv_bytes: int = 0
    micro_batch: int = 0
    prefill_chunk: int = 0
    context_tokens: int = 0
    paged: PagedKv | None = None

    @property
    def tokens_at_once(self) -> int:
        """Tokens of one sequence in one pass."""
        return min(self.pass_tokens, self.prefill_chunk or self.pass_tokens)

    @property
    def parts(self) -> int:
        """Into which a layer's batch is taken apart."""
        return -(-self.batch_size // self.micro_batch) if self.micro_batch else 1

    def kv_bytes(self, model: ModelSpec) -> int:
        """On the device."""
        # What a sliding window keeps of a prompt is a part of a tensor that goes with the next pass.
        sliding = sum(
            min(self.total_tokens, tokens + self.tokens_at_once) * token_bytes
            for tokens, token_bytes in model.kv_sliding_windows
        )
        sequence_bytes = model.state_bytes_per_sequence + sliding + self.total_tokens * model.kv_bytes_per_token
        whole = self.batch_size * sequence_bytes
        if self.paged is not None and model.kv is not None:
            whole += self.paged.memory_bytes - self.batch_size * self.total_tokens * model.kv.all_token_bytes
            if self.paged.state_offload:
                others = len(model.layers) - model.kv.layers
                away = max(0, others - _OFFLOADED_STATES_AT_ONCE) / max(1, others)
                whole -= int(self.batch_size * (sliding + model.state_bytes_per_sequence) * away)
        return max(self.least_kv_bytes, whole)

    def kv_host_bytes(self, model: ModelSpec, host_bytes: int) -> int:
        """Bytes of CPU memory beside a device for pages that the device has no room for; never more than half of it.

        Room for all of them: of the device's part, most is for pages that come and go, and what stays is known only once it is
        cut.
        """
        if self.paged is None or model.kv is None:
            return 0
        stored = self.batch_size * self.total_tokens * model.kv.all_token_bytes * self.paged.stored_percent // 100
        return max(0, min(stored, host_bytes // 2))

    def activation_bytes(self, model: ModelSpec) -> int:
        """What a pass holds beside weights and KV cache, and the workspaces of its kernels."""
        between = self.batch_size * self.tokens_at_once * model.activations.between_bytes
        at_once = min(self.batch_size, self.micro_batch or self.batch_size)
        inside = at_once * self._sequence_bytes(model, self.tokens_at_once)
        # The parts' keys and values are put together, a layer at a time.
        joined = 2 * self.kv_bytes(model) // max(1, len(model.layers)) if self.parts > 1 else 0
        return between + inside + joined + self.batch_size * model.logits_bytes_per_sequence + model.workspace_bytes

    def decode_micro_batch(self, model: ModelSpec) -> int:
        """Sequences that a layer computes at once in decode, in what is set aside for a prompt's parts; 0 for all."""
        if self.parts == 1:
            return 0
        room = self.micro_batch * self._sequence_bytes(model, self.tokens_at_once)
        at_once = max(self.micro_batch, room // max(1, self._sequence_bytes(model, 1)))
        return at_once if at_once < self.batch_size else 0

    def _sequence_bytes(self, model: ModelSpec, tokens: int) -> int:
        """What one sequence holds inside of a layer in a pass of `tokens`."""
        each = model.activations
        context = max(self.pass_tokens, self.total_tokens, self.context_tokens)
        if self.paged is not None and self.paged.segments:
            # A piece at a time; only the first pass of a prompt is computed by the stock kernel.
            context = tokens
        return tokens * (each.token_bytes - each.between_bytes) + context * each.context_bytes
