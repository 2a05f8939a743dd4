"""Notices that modules or parameters were registered somewhere, so that only then a model is searched for changes."""

from typing import Any

from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)


class RegistrationWatch:
    """True to `take` if anything was registered in any module of the process since the last time."""

    def __init__(self) -> None:
        self._seen = False
        self._handles = [
            register_module_parameter_registration_hook(self._notice),
            register_module_module_registration_hook(self._notice),
        ]

    def take(self) -> bool:
        seen, self._seen = self._seen, False
        return seen

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _notice(self, module: Any, name: str, value: Any) -> None:
        self._seen = True
