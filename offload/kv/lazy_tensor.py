"""Keys and values that are somewhere in pages, as a model's code passes them on to its attention."""

from typing import Any

import torch

from offload.kv.layer import PagedLayer

_METADATA = frozenset(
    {"__get__", "size", "dim", "stride", "numel", "is_floating_point", "is_contiguous", "element_size", "__len__", "__repr__"}
)


class LazyKvTensor(torch.Tensor):
    """Keys or values of a layer, [batch, heads, length, dim], without memory of its own.

    Our attention finds the layer behind it. Any other code that computes with it gets the whole in one piece, which is told.
    """

    layer: PagedLayer
    is_keys: bool

    @staticmethod
    def of(layer: PagedLayer, is_keys: bool) -> "LazyKvTensor":
        kind = layer.kind
        assert kind is not None
        dim = kind.key_dim if is_keys else kind.value_dim
        shape = (layer.batch_size, kind.heads, layer.length, dim)
        device = layer.store.raw.device.torch_device
        made: LazyKvTensor = torch.Tensor._make_wrapper_subclass(LazyKvTensor, shape, dtype=kind.dtype, device=device)
        made.layer, made.is_keys = layer, is_keys
        return made

    def whole(self) -> torch.Tensor:
        """In one piece."""
        if self.layer.policy.custom_attention:
            raise NotImplementedError(
                "the model's code computes with cached keys and values outside of its attention, so that no policy can choose "
                "among them; give kv_policy='none', 'int8' or 'int4'"
            )
        self.layer.store.warn(
            "the model's code computes with cached keys and values outside of its attention: they are put together for it"
        )
        pair = self.layer.assembled()
        return pair.keys if self.is_keys else pair.values

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") not in _METADATA:
            args = [value.whole() if isinstance(value, LazyKvTensor) else value for value in args]
            kwargs = {name: value.whole() if isinstance(value, LazyKvTensor) else value for name, value in kwargs.items()}
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args = [value.whole() if isinstance(value, LazyKvTensor) else value for value in args]
        return function(*args, **(kwargs or {}))
