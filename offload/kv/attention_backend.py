"""Our attention where transformers looks for one: beside the mask that it takes."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from offload.kv.attention import attend
from offload.kv.lazy_tensor import LazyKvTensor
from offload.storage.errors import ConfigError

_PREFIX = "offload_"
_STOCK = ("sdpa", "eager")


def _attention(stock: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """Pages by our attention; plain tensors by the stock one."""

    def forward(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not isinstance(key, LazyKvTensor) or kwargs.get("position_bias") is not None:
            eager: Any = getattr(_own_module(module), "eager_attention_forward", None)
            function: Any = AttentionInterface().get_interface(stock, eager)
            answer: tuple[torch.Tensor, torch.Tensor | None] = function(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
            )
            return answer
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = attend(key.layer, query, attention_mask, scale, kwargs.get("softcap"), kwargs.get("s_aux"))
        return output.transpose(1, 2).contiguous(), None

    return forward


def _own_module(module: nn.Module) -> Any:
    return sys.modules[type(module).__module__]


for _stock in _STOCK:
    AttentionInterface.register(_PREFIX + _stock, _attention(_stock))
    AttentionMaskInterface.register(_PREFIX + _stock, AttentionMaskInterface()[_stock])


class PagedAttention:
    """Lets a model attend by our function until `undo`.

    Raises:
        ConfigError: if its attention is its own code, which takes no other.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._before = str(getattr(model.config, "_attn_implementation", ""))
        if not supports_custom_attention(model):
            raise ConfigError(
                f"the attention of {type(model).__name__} ({self._before or 'its own code'}) cannot be replaced, and reading "
                "the KV cache in pieces takes that; give the KV cache enough memory for a layer in one piece, and "
                "kv_policy='none', 'int8' or 'int4'"
            )
        model.set_attn_implementation(_PREFIX + self._before)  # type: ignore[operator]

    def undo(self) -> None:
        self._model.set_attn_implementation(self._before)


def supports_custom_attention(model: nn.Module) -> bool:
    """Whether a model's attention can be replaced."""
    stock = str(getattr(getattr(model, "config", None), "_attn_implementation", ""))
    return bool(getattr(model, "_supports_attention_backend", False)) and stock in _STOCK
