"""Notices that modules or parameters were registered somewhere, so that only then a model is searched for changes."""

import weakref
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)


class RegistrationWatch:
    """True to `take` if the model has other modules or parameters than the last time.

    It is searched only if something was registered in one of its modules. Slices of lists of layers, which models make anew
    in every pass, register too, and belong to no model; parametrisations come and go within a pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known = _parts_of(model)
        self._seen = False
        self._handles = [
            register_module_parameter_registration_hook(self._notice),
            register_module_module_registration_hook(self._notice),
        ]

    def take(self) -> bool:
        seen, self._seen = self._seen, False
        if not seen:
            return False
        before, self._known = self._known, _parts_of(self._model)
        # The address of what is gone may be another's by now.
        return before.keys() != self._known.keys() or any(found() is None for found in before.values())

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _notice(self, module: Any, name: str, value: Any) -> None:
        self._seen = self._seen or id(module) in self._known


def _parts_of(model: nn.Module) -> dict[int, weakref.ref[Any]]:
    return {id(part): weakref.ref(part) for part in (*model.modules(), *model.parameters())}
