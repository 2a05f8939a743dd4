"""What the KV cache demands of a plan: the ways to keep it in pages, and what to say of the one that was taken."""

from torch import nn

from offload.config import ROUNDING
from offload.kv.attention_backend import supports_custom_attention
from offload.kv.options import KvOptions
from offload.model.text_generation import can_generate
from offload.planning.describe import element_bytes_of, kv_sizes
from offload.planning.fit import FittedPlan
from offload.scheduler.kv_pages import KvDemand, KvShape, PagedKv, cut, paged_ways
from offload.scheduler.model_spec import Workload
from offload.scheduler.plan import Plan
from offload.storage.errors import BudgetTooSmall, ConfigError, gib

_SHARED_ROOM = 1.5
"""Times the memory that a batch with a shared prefix takes."""


def kv_demand(model: nn.Module, workload: Workload, options: KvOptions, exactness: str) -> KvDemand:
    """List the ways to keep the KV cache in pages, the best first.

    Raises:
        ConfigError: if a method was asked for that the model cannot take.
        BudgetTooSmall: if the memory that was asked for is too little.
    """
    ways = _ways(model, workload, options, exactness)
    shares = options.shared_tokens > 0 and supports_custom_attention(model)
    required = options.is_lossy or (bool(ways) and (shares or options.memory_bytes is not None))
    return KvDemand(tuple(ways), required)


def kv_notes(model: nn.Module, fitted: FittedPlan, workload: Workload, options: KvOptions, exactness: str) -> list[str]:
    """Say what became of what was asked of the KV cache, where the plan does otherwise."""
    pieces = _in_pieces(fitted, workload, options) if exactness != ROUNDING else []
    return [*pieces, *_unshared(model, fitted.plan, options)]


def _unshared(model: nn.Module, plan: Plan, kv: KvOptions) -> list[str]:
    """Explain why the shared prompt prefix is computed and read once per sequence."""
    if not kv.shared_tokens or plan.kv.segments:
        return []
    return [
        "the shared prompt prefix is not shared: it is computed and read once per sequence, because the attention of "
        f"{type(model).__name__} is its own code, or no layer keeps all tokens"
    ]


def _in_pieces(fitted: FittedPlan, workload: Workload, kv: KvOptions) -> list[str]:
    """Explain that `kv_memory` cannot hold one layer contiguously, and how much would."""
    shape = fitted.spec.kv
    if not fitted.plan.kv.segments or kv.is_lossy or shape is None:
        return []
    try:
        cut(shape, workload.batch_size, workload.total_tokens, fitted.plan.kv.memory_bytes, False)
    except BudgetTooSmall as error:
        return [
            f"{gib(fitted.plan.kv.memory_bytes)} for the KV cache have no room for a layer in one piece: attention reads it "
            f"piece by piece, exactness is rounding; from kv_memory={error.least_bytes} ({gib(error.least_bytes)}) on it is "
            "identical"
        ]
    return []


def _ways(model: nn.Module, workload: Workload, kv: KvOptions, exactness: str) -> list[PagedKv]:
    """The ways to keep the KV cache in pages, the best first; none where that was asked for and everything fits anyway.

    Raises:
        ConfigError: if a method was asked for that the model cannot take.
        BudgetTooSmall: if the memory that was asked for is too little.
    """
    element_bytes = element_bytes_of(model)
    shape = kv_sizes(getattr(model, "config", None), element_bytes).shape if can_generate(model) else None
    if shape is None:
        if kv.is_lossy or kv.memory_bytes is not None:
            raise ConfigError(
                f"{type(model).__name__} has no layers that keep keys and values of all tokens (they are sliding, recurrent, "
                "or there are none), so that kv_memory and kv_policy say nothing: leave them out"
            )
        return []
    own_attention = supports_custom_attention(model)
    shares = kv.shared_tokens > 0 and own_attention
    if kv.memory_bytes is not None and not (kv.is_lossy or shares) and _whole(workload, shape) <= kv.memory_bytes:
        return []
    if kv.method.takes_budget and not own_attention:
        raise ConfigError(
            f"kv_policy={kv.policy!r} chooses what a query sees, and the attention of {type(model).__name__} is its own code, "
            "which cannot be told; give kv_policy='none', 'int8' or 'int4'"
        )
    segments = [False, True] if own_attention else [False]
    if kv.method.takes_budget or shares:
        segments = [True]
    elif exactness == ROUNDING:
        segments.reverse()
    percent = kv.stored_percent(element_bytes)
    sizes = workload.batch_size, workload.total_tokens
    share = 1.0
    if shares:
        share *= 1 - (1 - 1 / sizes[0]) * min(kv.shared_tokens, sizes[1]) / sizes[1]
        # Each layer fills two pages more: the beginning's last one, and the first one after it.
        share *= _SHARED_ROOM
    return paged_ways(
        shape,
        *sizes,
        kv.memory_bytes,
        segments,
        percent,
        share,
        kv.tokens_a_page(sizes[1]),
        kv.index_share,
        anyway=kv.is_lossy or shares,
    )


def _whole(workload: Workload, shape: KvShape) -> int:
    return workload.batch_size * workload.total_tokens * shape.all_token_bytes
