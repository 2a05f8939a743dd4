"""What the planner must know of a model: the bytes of its blocks, its KV cache and its temporaries."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from offload.model.blocks import StoredSize, Structure, Unit, divisible_modules
from offload.model.experts import ExpertsUnit, expert_slot_bytes
from offload.model.text_generation import can_generate
from offload.planning.dry_run import DryRun
from offload.planning.operations import DryRunFailed
from offload.planning.pass_splits import LEAST_CHUNK
from offload.scheduler.kv_pages import KvShape
from offload.scheduler.model_spec import (
    ActivationSizes,
    BlockRole,
    DivisibleWeight,
    ExpertsSpec,
    ModelSpec,
    PlacedBlock,
    Workload,
)
from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES, DTYPE_BYTES, align_up

_HIDDEN_COPIES = 12
"""Tensors as wide as the hidden state that a layer holds at once: input, residual, norm, q, k, v, attention, their casts."""

_INTERMEDIATE_COPIES = 4
"""Tensors as wide as the MLP: gate, up, their product, a cast."""

_MARGIN = 1.1
"""Times the counted activations: kernels have workspaces of their own."""

_LEAST_TOKENS_COUNTED = 128
"""In fewer, what does not grow with the tokens would weigh too much."""

_FEW_TOKENS = 4
"""After which recurrent layers have their whole state."""

_CHUNK_OF = 8
"""The part of a short prompt whose last piece is counted by itself; of a long one, the smallest chunk."""

_CHOSEN_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "num_selected_experts")
"""What configs call the number of experts that a token is sent to. Only planning needs it."""

_CHOSEN_DEFAULT = 2

_LOGITS_BYTES_EACH = 16
"""Bytes of one logit: in the model's dtype, in fp32, and sorted or soft-maxed while a token is drawn."""


def model_spec(
    model: nn.Module,
    structure: Structure,
    size_of: Callable[[Unit], StoredSize],
    activations: ActivationSizes | None = None,
    experts: Sequence[ExpertsUnit] = (),
) -> ModelSpec:
    """Describe `model` to the planner.

    Args:
        size_of: what a unit's block takes, in files and in the slots.
        temporaries: as counted; None to estimate them from the config.
        experts: those that are brought one by one.
    """
    config = getattr(model, "config", None)
    element_bytes = element_bytes_of(model)
    kv = kv_sizes(config, element_bytes) if can_generate(model) else KvSizes()
    owned = {unit.key for unit in structure.units if unit.parameters}
    return ModelSpec(
        blocks=tuple(_placed(unit, size_of) for unit in structure.units if unit.parameters),
        co_resident_blocks=tuple(
            tuple(key for key in unit.uses if key in owned) for unit in structure.units if not unit.fetches_rows
        ),
        always_resident_bytes=sum(value.nbytes for value in (*structure.always_resident.values(), *model.buffers())),
        kv_bytes_per_token=kv.token_bytes,
        kv_sliding_windows=kv.sliding_windows,
        kv=kv.shape,
        state_bytes_per_sequence=_state_bytes(config, activations) if can_generate(model) else 0,
        activations=activations or ActivationSizes(_activation_bytes(config, element_bytes)),
        logits_bytes_per_sequence=_LOGITS_BYTES_EACH * int(getattr(_text_config(config), "vocab_size", 0) or 0),
        experts=experts_spec(model, experts) if experts else None,
    )


def element_bytes_of(model: nn.Module) -> int:
    """Bytes of one number in the model's dtype."""
    dtype = next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32)
    return DTYPE_BYTES[str(dtype).removeprefix("torch.")]


def experts_spec(model: nn.Module, units: Sequence[ExpertsUnit]) -> ExpertsSpec:
    """Describe experts that are brought one by one."""
    return ExpertsSpec(
        layers=tuple(unit.key for unit in units),
        counts=tuple(unit.count for unit in units),
        chosen=min(chosen_experts(model), *(unit.count for unit in units)),
        expert_bytes=tuple(unit.nbytes for unit in units),
        slot_bytes=max(expert_slot_bytes(unit.layout) for unit in units),
    )


def chosen_experts(model: nn.Module) -> int:
    """How many experts a token is sent to in one layer, as the config says."""
    text = _text_config(getattr(model, "config", None))
    found = (getattr(text, name, None) for name in _CHOSEN_NAMES)
    counts = [value if isinstance(value, int) else max(value) for value in found if value]
    return max(1, counts[0]) if counts else _CHOSEN_DEFAULT


@dataclass(frozen=True, slots=True)
class KvSizes:
    """What a model's KV cache takes, as its config tells.

    Attributes:
        token_bytes: keys and values of one token, in all layers that keep every token.
        sliding_windows: (tokens, bytes a token) of the layers that keep so many tokens at most.
        shape: of the layers that keep every token in transformers' plain way, which pages can take the place of.
    """

    token_bytes: int = 0
    sliding_windows: tuple[tuple[int, int], ...] = ()
    shape: KvShape | None = None


def kv_sizes(config: Any, element_bytes: int) -> KvSizes:
    """Nothing where the config does not tell."""
    text = _text_config(config)
    hidden, heads = _field(text, "hidden_size"), _field(text, "num_attention_heads")
    layers = _field(text, "decoder_layers") or _field(text, "num_hidden_layers")
    if not (hidden and heads and layers):
        return KvSizes()
    head_dim = _field(text, "head_dim") or hidden // heads
    key_dim = (_field(text, "qk_nope_head_dim") or 0) + (_field(text, "qk_rope_head_dim") or 0) or head_dim
    value_dim = _field(text, "v_head_dim") or head_dim
    kv_heads = _field(text, "num_key_value_heads") or heads
    each = int(kv_heads * (key_dim + value_dim) * element_bytes)
    # Cross attention keeps the encoder's tokens, which are counted as if they were as many.
    across = each * layers if getattr(config, "is_encoder_decoder", False) else 0
    try:
        kept = DynamicCache(config=config).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        return KvSizes(each * layers + across)
    plain = sum(type(layer) is DynamicLayer for layer in kept)
    sliding = [int(layer.sliding_window) for layer in kept if isinstance(layer, DynamicSlidingWindowLayer)]
    all_tokens = sum(isinstance(layer, DynamicLayer) for layer in kept) - len(sliding)
    return KvSizes(
        each * all_tokens + across,
        tuple((tokens, each * sliding.count(tokens)) for tokens in sorted(set(sliding))),
        KvShape(plain, each) if plain else None,
    )


def _state_bytes(config: Any, activations: ActivationSizes | None) -> int:
    counted = None if activations is None else activations.state_bytes
    return estimated_state_bytes(config) if counted is None else counted


def _counted_state_bytes(model: nn.Module, dry_run: DryRun) -> int | None:
    """What the cache of a few tokens takes that is not keys and values."""
    try:
        held = dry_run.cache_bytes(_FEW_TOKENS)
    except DryRunFailed:
        return None
    kv = kv_sizes(getattr(model, "config", None), element_bytes_of(model))
    sliding = sum(min(_FEW_TOKENS, tokens) * nbytes for tokens, nbytes in kv.sliding_windows)
    return max(0, held - _FEW_TOKENS * kv.token_bytes - sliding) if held else None


def estimated_state_bytes(config: Any) -> int:
    """What state-space (Mamba) and linear-attention layers keep of a sequence, in fp32; every layer is counted as one."""
    text = _text_config(config)
    layers, hidden = _field(text, "num_hidden_layers") or 0, _field(text, "hidden_size") or 0
    state = _field(text, "state_size") or _field(text, "mamba_d_state") or 0
    kernel = _field(text, "conv_kernel") or _field(text, "mamba_d_conv") or 4
    width = hidden * (_field(text, "expand") or _field(text, "mamba_expand") or 2)
    heads = _field(text, "linear_num_value_heads") or 0
    key_dim, value_dim = _field(text, "linear_key_head_dim") or 0, _field(text, "linear_value_head_dim") or 0
    elements = (width * (state + kernel) if state else 0) + heads * (key_dim * value_dim + kernel * (2 * key_dim + value_dim))
    return int(4 * layers * elements)


def longest_sequence(config: Any) -> int | None:
    """The tokens of one sequence that the model was made for; None where the config does not tell."""
    length = getattr(_text_config(config), "max_position_embeddings", None)
    return int(length) if isinstance(length, int) and length > 0 else None


def takes_tokens(model: nn.Module) -> bool:
    """True if the model reads or makes text, whose length tells how large its temporaries will be."""
    return can_generate(model) or getattr(model, "main_input_name", None) in ("input_ids", "decoder_input_ids", "inputs_embeds")


def count_activations(model: nn.Module, workload: Workload) -> ActivationSizes | None:
    """The most that a pass of the workload holds beside weights and KV cache, with a margin.

    Counted by dry runs of the prompt as a whole and of its last piece, so that attention that builds its scores is seen,
    and what grows with the context is told from what grows with the pass. None where the model cannot be run so.
    """
    batch_size = workload.batch_size
    tokens = max(workload.pass_tokens, -(-_LEAST_TOKENS_COUNTED // batch_size))
    try:
        dry_run = DryRun(model)
        whole = dry_run.forward(batch_size, tokens)
    except DryRunFailed:
        return None
    between = whole.between_bytes * _MARGIN / (batch_size * tokens)
    most = whole.activation_bytes
    try:
        # The smallest piece there is: what is held grows ever faster with a pass, so that a line up to the whole is above it.
        chunk = max(1, min(LEAST_CHUNK, tokens // _CHUNK_OF))
        last = dry_run.continued(batch_size, chunk, tokens - chunk)
        each = max(0.0, (whole.activation_bytes - last.activation_bytes) / (tokens - chunk))
        most = max(most, last.activation_bytes)
    except DryRunFailed:
        each = most / tokens
    context = max(0.0, most / tokens - each)
    scale = _MARGIN / batch_size
    between = min(int(between) + 1, int(each * scale) + 1)
    state = _counted_state_bytes(model, dry_run) if can_generate(model) else None
    return ActivationSizes(int(each * scale) + 1, int(context * scale) + 1, between, state)


def _divisible(unit: Unit) -> tuple[DivisibleWeight, ...]:
    """The weights of plain products in a layer."""
    if unit.role is not BlockRole.LAYER:
        return ()
    weights = [module.weight for _, module in divisible_modules(unit)]
    return tuple(DivisibleWeight(len(weight), weight[0].nbytes, weight.element_size()) for weight in weights)


def _placed(unit: Unit, size_of: Callable[[Unit], StoredSize]) -> PlacedBlock:
    size = size_of(unit)
    # Read in whole units, a resident block takes what a slot takes, in whole pages.
    resident_bytes = align_up(max(unit.block.packed_bytes, size.slot_bytes), BLOCK_ALIGNMENT_BYTES)
    return PlacedBlock(
        unit.key,
        unit.role,
        resident_bytes,
        size.slot_bytes,
        size.stored_bytes,
        _divisible(unit),
        size.codec,
        size.decode_seconds,
        size.encoded_bytes,
    )


def _activation_bytes(config: Any, element_bytes: int) -> int:
    text = _text_config(config)
    hidden = int(getattr(text, "hidden_size", 0) or 0)
    intermediate = getattr(text, "intermediate_size", None)
    intermediate = intermediate if isinstance(intermediate, int) else 4 * hidden
    return element_bytes * (_HIDDEN_COPIES * hidden + _INTERMEDIATE_COPIES * intermediate)


def _text_config(config: Any) -> Any:
    get = getattr(config, "get_text_config", None)
    return config if get is None else get(decoder=True)


def _field(config: Any, name: str) -> Any:
    """The largest value of a field of a config, whose layers may each have another one; None where it has none."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:
        value = [getattr(config.per_layer_config[layer], name, None) for layer in range(int(config.num_hidden_layers))]
    if isinstance(value, (list, tuple)):
        return max((each for each in value if isinstance(each, int)), default=None)
    return value
