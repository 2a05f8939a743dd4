"""peft's adapters on parameters that are no layer's weight (fused experts, routers): `lora.ParamWrapper`.

In each forward, peft registers a parametrisation on the parameter and removes it again, for which torch sets the parameter to
itself: its version counter says that it was written to. It was not, and what follows from a write (the values are fetched from
the slot; backward refuses) must not follow.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def is_wrapper(module: nn.Module) -> bool:
    """Whether peft adapts a parameter of the module inside with this one."""
    return type(module).__name__ == "ParamWrapper" and hasattr(module, "parameter_name") and hasattr(module, "get_base_layer")


def unwritten(wrapper: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes the wrapper's forward from its own: the parameter's version is the same afterwards."""

    def make(forward: Callable[..., Any]) -> Callable[..., Any]:
        def preserving(*args: Any, **kwargs: Any) -> Any:
            parameter = wrapper.get_base_layer()._parameters.get(wrapper.parameter_name)
            if parameter is None:
                # One inside of another, on the same parameter: the outer one sees to it.
                return forward(*args, **kwargs)
            with torch.autograd._unsafe_preserve_version_counter(parameter):  # type: ignore[attr-defined]
                return forward(*args, **kwargs)

        return preserving

    return make
