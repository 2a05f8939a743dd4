"""State of layers that do not keep all tokens (sliding, recurrent, indexed ones), in pages while other layers have their turn.

These layers are transformers' own and write their state anew in each pass, so that it goes down and comes back each time: only
for where nothing else fits. A layer whose state is away lacks the attributes; whoever asks for one gets all of them back first.
"""

from typing import Any

import torch

from offload.kv.store import KvStore
from offload.storage.pages.pool import Page

_UPDATES = ("update", "update_conv_state", "update_recurrent_state", "update_indexer")


class StateOffloader:
    """Puts states away, and brings them back; the one that was used last stays.

    Args:
        store: whose pages are used.
    """

    def __init__(self, store: KvStore) -> None:
        self.order = self
        self._store = store
        self._last: Any = None
        self._away: dict[int, tuple[list[Page], list[tuple[str, Any, torch.Tensor]]]] = {}
        """The offloaded states by layer: pages, and (attribute, key in it, an empty tensor of the same kind)."""

    def keep(self, layer: Any) -> None:
        """From now on the state of this layer can be away."""
        kind = type(layer)
        made: dict[str, Any] = {name: _turned(name) for name in _UPDATES if hasattr(kind, name)}
        made |= {"__getattr__": _missing, "__del__": _gone, "__deepcopy__": _uncopied}
        # Not a kind of its own to transformers, which notes the kinds of layers.
        layer.__class__ = type(f"Offloaded{kind.__name__}", (kind,), made | {"_layer_type": None})
        layer.__dict__["_state_offloader"] = self

    def close(self) -> None:
        """Nothing is added to an open page any more: states have pages of their own."""

    def on_layer_start(self, layer: Any) -> None:
        """This layer computes: the one before is offloaded."""
        before, self._last = self._last, layer
        if before is not None and before is not layer and self._store.is_open:
            self.offload(before)

    def offload(self, layer: Any) -> None:
        states = list(_states(layer))
        if id(layer) in self._away or not states:
            return
        with torch.no_grad():
            whole = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for _, _, tensor in states])
            pages = [self._store.keep_bytes(self, part) for part in whole.split(self._store.raw.page_bytes)]
        kinds = [(name, key, torch.empty_like(tensor, device="meta")) for name, key, tensor in states]
        self._away[id(layer)] = pages, kinds
        for name in dict.fromkeys(name for name, _, _ in states):
            layer.__dict__.setdefault("_offloaded_state", {})[name] = layer.__dict__.pop(name)
            if isinstance(held := layer.__dict__["_offloaded_state"][name], dict):
                held.update({key: None for other, key, _ in kinds if other == name})
            else:
                layer.__dict__["_offloaded_state"][name] = None

    def onload(self, layer: Any) -> None:
        """All of it; nothing happens if it is there."""
        if id(layer) not in self._away:
            return
        pages, kinds = self._away.pop(id(layer))
        device = self._store.raw.device.torch_device
        with torch.no_grad():
            whole = torch.cat([self._store.give_back(page) for page in pages])
        held, place = layer.__dict__.pop("_offloaded_state"), 0
        layer.__dict__.update(held)
        for name, key, kind in kinds:
            nbytes = kind.numel() * kind.element_size()
            tensor = torch.empty(kind.shape, dtype=kind.dtype, device=device)
            tensor.view(-1).view(torch.uint8).copy_(whole[place : place + nbytes])
            place += nbytes
            if key is None:
                layer.__dict__[name] = tensor
            else:
                layer.__dict__[name][key] = tensor

    def forget(self, layer: Any) -> None:
        """The layer is gone."""
        self._last = None if self._last is layer else self._last
        pages, _ = self._away.pop(id(layer), ([], []))
        if self._store.is_open:
            for page in pages:
                self._store.give_back(page, wanted=False)


def onload_state(layer: Any) -> None:
    """The state of a layer is there, wherever it was."""
    if "_state_offloader" in vars(layer):
        layer._state_offloader.onload(layer)


def _missing(self: Any, name: str) -> Any:
    if name in self.__dict__.get("_offloaded_state", ()):
        onload_state(self)
        return self.__dict__[name]
    raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def _gone(self: Any) -> None:
    if "_state_offloader" in vars(self):
        self._state_offloader.forget(self)


def _uncopied(self: Any, memo: dict[int, Any]) -> Any:
    raise NotImplementedError("a KV cache whose layers' states are on lower tiers is not copied; give it more memory")


def _turned(name: str) -> Any:
    """A method of the layer's own class, whose call is the layer's turn."""

    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        state_offloader = self.__dict__["_state_offloader"]
        state_offloader.onload(self)
        state_offloader.on_layer_start(self)
        return getattr(super(type(self), self), name)(*args, **kwargs)

    return update


def _states(layer: Any) -> Any:
    """(attribute, key in it or None, tensor) of every tensor with values."""
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor) and value.numel() > 1:
            yield name, None, value
        elif isinstance(value, dict) and name != "_offloaded_state":
            for key, item in value.items():
                if isinstance(item, torch.Tensor):
                    yield name, key, item
