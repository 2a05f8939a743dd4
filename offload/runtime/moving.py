"""Tensors inside of arguments and results, brought to a device."""

from typing import Any

import torch


def moved(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it on `device`; tuples, lists and dicts are gone through, other objects are not."""
    if isinstance(value, torch.Tensor):
        return value.to(device) if value.device != device else value
    if type(value) in (tuple, list):
        return type(value)(moved(item, device) for item in value)
    if type(value) is dict:
        return {name: moved(item, device) for name, item in value.items()}
    return value
