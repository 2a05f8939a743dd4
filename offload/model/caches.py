"""What a transformers cache holds, of whatever kind it is."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache


def new_cache(model: nn.Module) -> Any:
    """An empty cache of transformers' own, as `generate` makes it."""
    config: Any = model.config
    cache = DynamicCache(config=config)
    return EncoderDecoderCache(cache, DynamicCache(config=config)) if config.is_encoder_decoder else cache


def keeps_cache(model: nn.Module) -> bool:
    """True if the model keeps keys and values, or a state, of a pass that says nothing of it."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "use_cache", True))


_HOLDERS = (torch.Tensor, list, tuple, dict)


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors of a transformers cache, of any kind."""
    if isinstance(cache, torch.Tensor):
        return cache.nbytes
    if isinstance(cache, (list, tuple)):
        return sum(cache_bytes(item) for item in cache)
    if isinstance(cache, dict):
        return sum(cache_bytes(item) for item in cache.values())
    layers = getattr(cache, "layers", None)
    if layers is not None:
        # Asked in every pass, of every layer: a call for each number among a layer's attributes would take milliseconds.
        held = [value for layer in layers for value in vars(layer).values() if isinstance(value, _HOLDERS)]
        return sum(value.nbytes if isinstance(value, torch.Tensor) else cache_bytes(value) for value in held)
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    return sum(cache_bytes(part) for part in parts if part is not None)


def is_known(cache: Any) -> bool:
    """True if `snapshot` can take the cache."""
    return isinstance(cache, EncoderDecoderCache) or hasattr(cache, "layers")


def snapshot(cache: Any) -> Any:
    """The cache as it is now, whatever is added to the one that was given."""
    before = copy.copy(cache)
    if isinstance(cache, EncoderDecoderCache):
        before.self_attention_cache = snapshot(cache.self_attention_cache)
        before.cross_attention_cache = snapshot(cache.cross_attention_cache)
        before.is_updated = dict(cache.is_updated)
    else:
        before.layers = [_layer_snapshot(layer) for layer in cache.layers]
    return before


def _layer_snapshot(layer: Any) -> Any:
    """Keys and values are replaced as they grow; states of recurrent layers are in dictionaries, and written to."""
    before = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            copied = {key: item.clone() if isinstance(item, torch.Tensor) else item for key, item in value.items()}
            setattr(before, name, copied)
    return before


def cached_tokens(cache: Any) -> int | None:
    """Positions of one sequence that a transformers cache holds; None if it does not tell (a state-space model's)."""
    length = getattr(cache, "get_seq_length", None)
    try:
        return int(length()) if callable(length) else None
    except ValueError:
        return None


def fixed_length(cache: Any) -> int:
    """Positions of a cache that was made in advance; 0 for one that grows."""
    layers = getattr(cache, "layers", None) or getattr(getattr(cache, "self_attention_cache", None), "layers", None)
    lengths = [getattr(layer, "max_cache_len", 0) for layer in layers or ()]
    return max((length for length in lengths if isinstance(length, int)), default=0)
