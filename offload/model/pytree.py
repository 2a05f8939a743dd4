"""Tensors inside of arguments and results: tuples, lists and dicts are gone through, other objects are not."""

from collections.abc import Iterator
from typing import Any

import torch


def leaves(value: Any) -> Iterator[Any]:
    """Everything that is no tuple, list or dict."""
    if type(value) in (tuple, list):
        for item in value:
            yield from leaves(item)
    elif type(value) is dict:
        for item in value.values():
            yield from leaves(item)
    else:
        yield value


def tensors(value: Any) -> Iterator[torch.Tensor]:
    return (item for item in leaves(value) if isinstance(item, torch.Tensor))


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device) if value.device != device else value
    if type(value) in (tuple, list):
        return type(value)(to_device(item, device) for item in value)
    if type(value) is dict:
        return {name: to_device(item, device) for name, item in value.items()}
    return value
