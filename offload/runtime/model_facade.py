"""What an offloaded model answers to `device`, `to`, copying and pickling, for the time of the context."""

import functools
import warnings
from typing import Any

import torch
from torch import nn

from offload.runtime.late_generation import GenerationWatch
from offload.storage.errors import SessionError

_MARK = "_offload_guise"


class OffloadedModelClass:
    """Gives a model a class of the same name that knows it is offloaded, until undone.

    Args:
        model: an instance of any module class.
        device: what `model.device` says.
        warn: told a sentence when something is used in a slower way than plain transformers would.
        watch: told of threads that generate.

    Raises:
        SessionError: if the model, or a part of it, is offloaded already.
    """

    def __init__(self, model: nn.Module, device: torch.device, warn: Any, watch: GenerationWatch) -> None:
        if any(_MARK in vars(type(module)) for module in model.modules()):
            raise SessionError(f"this {type(model).__name__} is offloaded already; leave the other context first")
        self._model = model
        self._original = type(model)
        model.__class__ = _offloaded_class(self._original, device, warn, watch)

    def undo(self) -> None:
        self._model.__class__ = self._original


def _offloaded_class(original: type, device: torch.device, warn: Any, watch: GenerationWatch) -> Any:
    members: dict[str, Any] = {
        _MARK: True,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "to": _to(device),
        "cuda": _cuda(device),
        "cpu": lambda self: self.to("cpu"),
        "_apply": _apply(device),
        "__reduce_ex__": _refuse("Copying or pickling the model", "Use save_pretrained, or leave the context first."),
    }
    if hasattr(original, "device"):
        members["device"] = property(lambda self: device)
    if hasattr(original, "generate"):
        members["generate"] = _generate(original, watch)
    if hasattr(original, "_valid_auto_compile_criteria"):
        members["_valid_auto_compile_criteria"] = _no_compilation(original, warn)
    return type(original.__name__, (original,), members)


def _generate(original: Any, watch: GenerationWatch) -> Any:
    @functools.wraps(original.generate)
    def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with watch.generating():
            return original.generate(self, *args, **kwargs)

    return generate


def _cuda(device: torch.device) -> Any:
    def cuda(self: nn.Module, index: int | torch.device | None = None) -> nn.Module:
        # Without a number, the card that it is on, whichever that is.
        if isinstance(index, int):
            index = torch.device("cuda", index)
        return self.to(index or (device if device.type == "cuda" else "cuda"))

    return cuda


def _to(device: torch.device) -> Any:
    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        target, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and any(value.is_floating_point() and value.dtype != dtype for value in self.parameters()):
            raise SessionError(
                f".to({dtype}) is not possible while the model is offloaded. Give dtype= when loading, or convert before."
            )
        if target is not None and (target.type != device.type or target.index not in (None, device.index)):
            raise SessionError(
                f".to({str(target)!r}) is not possible while the model is offloaded to {device}. Leave the context first."
            )
        if memory_format is not None and any(value.dim() in (4, 5) for value in self.parameters()):
            raise SessionError(
                f".to(memory_format={memory_format}) is not possible while the model is offloaded. Do it before."
            )
        warnings.warn(f"the model computes on {device} already: .to() does nothing inside the context", stacklevel=2)
        return self

    return to


def _apply(device: torch.device) -> Any:
    """What `to`, `float` or `cpu` of a module around the model comes to: nothing, where nothing would change."""

    def applied(self: nn.Module, convert: Any, recurse: bool = True) -> nn.Module:
        tensors = (*self.parameters(), *self.buffers())
        for dtype, dimensions in {(value.dtype, value.dim()) for value in tensors}:
            like = torch.empty((2,) * dimensions, dtype=dtype, device=device)
            if convert(like) is not like or (like.device.type == "cpu" and like.is_shared()):
                raise SessionError(
                    f"Converting or moving the parameters is not possible while the model is offloaded: they are {dtype} and "
                    f"compute on {device}. Do it before offloading."
                )
        return self

    return applied


def _refuse(what: str, instead: str) -> Any:
    def refused(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise SessionError(f"{what} is not possible while the model is offloaded. {instead}")

    return refused


def _no_compilation(original: Any, warn: Any) -> Any:
    def criteria(self: nn.Module, *args: Any, **kwargs: Any) -> bool:
        if original._valid_auto_compile_criteria(self, *args, **kwargs):
            warn("generate() would have compiled this model's forward: that is off while weights are streamed")
        return False

    return criteria
