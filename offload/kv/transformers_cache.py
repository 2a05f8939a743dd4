"""Paged layers in the place of a transformers cache's own."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from offload.kv.layer import AppendOrder, PagedLayer
from offload.kv.lazy_tensor import LazyKvTensor
from offload.kv.policies.base import LayerPolicy
from offload.kv.state_offload import StateOffloader
from offload.kv.store import KvStore


class PagedCacheLayer(DynamicLayer):
    """What transformers' code sees of a paged layer: `DynamicLayer`'s interface.

    Args:
        in_segments: attention reads page after page where the model's is ours; else a layer is put together for it.
    """

    def __init__(self, paged: PagedLayer, in_segments: bool) -> None:
        self.paged = paged
        self.in_segments = in_segments
        self.dtype: torch.dtype | None = None  # type: ignore[assignment]
        self.device: torch.device | None = None  # type: ignore[assignment]
        super().__init__()  # type: ignore[no-untyped-call]

    # Read by code that looks at a cache, such as cross attention: put together each time.
    @property
    def keys(self) -> torch.Tensor | None:
        return self.paged.assembled().keys if self.paged.length else None

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._refuse(value)

    @property
    def values(self) -> torch.Tensor | None:
        return self.paged.assembled().values if self.paged.length else None

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._refuse(value)

    def _refuse(self, value: torch.Tensor | None) -> None:
        if value is not None:
            raise NotImplementedError("the keys and values of a paged KV cache cannot be replaced; use update, crop, reset")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        paged, first = self.paged, self.paged.length == 0
        with paged.order.guarded(), torch.no_grad():
            paged.append(key_states, value_states)
            if first:
                # All there is to attend to is at hand.
                return key_states.contiguous(), value_states.contiguous()
            if self.in_segments:
                return LazyKvTensor.of(paged, True), LazyKvTensor.of(paged, False)
            return paged.assembled()

    def get_seq_length(self) -> int:
        return self.paged.length

    def crop(self, tokens_to_remove: int) -> None:
        # Some versions give a tensor.
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError("give the number of tokens to take away as a negative number")
        if tokens_to_remove:
            self.paged.truncate(-tokens_to_remove)

    def reset(self) -> None:
        self.paged.clear()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.paged.length:
            self.paged.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.paged.length:
            self.paged.repeat(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.paged.length:
            every = torch.arange(self.paged.batch_size)
            self.paged.select(every[indices.to(every.device)])

    def offload(self) -> None:
        """Pages go down by themselves."""

    def prefetch(self) -> None:
        """Pages come by themselves."""

    def __del__(self) -> None:
        # The cache is gone, and its pages are free again.
        if self.paged.store.is_open:
            self.paged.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "PagedCacheLayer":
        order = memo.setdefault(id(self.paged.order), AppendOrder())
        made = PagedCacheLayer(self.paged.copied(order), self.in_segments)
        made.dtype, made.device, made.is_initialized = self.dtype, self.device, self.is_initialized
        return made


class PagedLayers:
    """Makes the layers of caches.

    Args:
        policy: makes what one layer remembers of the policy.
        in_segments: as of `PagedCacheLayer`.
        state_offloader: for the state of layers of other kinds; None where it stays on the device.
    """

    def __init__(
        self,
        store: KvStore,
        policy: Callable[[], LayerPolicy],
        in_segments: bool,
        state_offloader: StateOffloader | None = None,
    ) -> None:
        self._store = store
        self._state_offloader = state_offloader
        self._policy = policy
        self._in_segments = in_segments

    def adopt(self, cache: Any) -> bool:
        """Replace a cache's own layers that keep every token by paged ones, while they are empty.

        Sliding, recurrent, indexed and static layers stay what they are, and so do caches of other kinds.

        Returns:
            Whether the cache has paged layers, or will have.
        """
        if isinstance(cache, EncoderDecoderCache):
            return self.adopt(cache.self_attention_cache)
        if type(cache) is not DynamicCache or cache.offloading:
            return False
        if any(isinstance(layer, PagedCacheLayer) for layer in cache.layers):
            return True
        order = AppendOrder()
        offloader = self._state_offloader
        for layer in cache.layers:
            if offloader is not None and type(layer) is not DynamicLayer and not isinstance(layer, StaticLayer):
                offloader.keep(layer)
        for index, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer and not layer.is_initialized:
                cache.layers[index] = self._layer(order)
        if cache.layer_class_to_replicate is DynamicLayer and not cache.layers:
            cache.layer_class_to_replicate = lambda: self._layer(order)  # type: ignore[assignment]
            return True
        return bool(order)

    def _layer(self, order: AppendOrder) -> PagedCacheLayer:
        return PagedCacheLayer(PagedLayer(self._store, self._policy(), order), self._in_segments)
