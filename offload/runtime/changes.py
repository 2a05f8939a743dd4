"""Notices that modules or parameters were registered somewhere, so that only then a model is searched for changes."""

from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)


class RegistrationWatch:
    """True to `take` if anything was registered in a module of the model since the last time.

    Slices of lists of layers, which models make anew in every pass, register too, and belong to no model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known = {id(module) for module in model.modules()}
        self._seen = False
        self._handles = [
            register_module_parameter_registration_hook(self._notice),
            register_module_module_registration_hook(self._notice),
        ]

    def take(self) -> bool:
        seen, self._seen = self._seen, False
        if seen:
            self._known = {id(module) for module in self._model.modules()}
        return seen

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _notice(self, module: Any, name: str, value: Any) -> None:
        self._seen = self._seen or id(module) in self._known
