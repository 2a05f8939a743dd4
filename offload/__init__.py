"""Run any transformers model on a device too small for it: `with offload("org/model", gpu_memory="8GiB") as session:`.

A name is imported when it is first used, so that what needs no torch (`--help`, the scheduler) does not wait for it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from offload.collector import held_collector
from offload.errors import *  # noqa: F403
from offload.storage.errors import __all__ as _errors
from offload.version import __version__ as __version__

if TYPE_CHECKING:
    from offload.api import offload
    from offload.kv.options import KvOptions
    from offload.moe.options import ExpertOptions
    from offload.runtime.machine import open_machine
    from offload.session.session import Session
    from offload.training.options import Training
    from offload.training.weighting import token_shares

__all__ = ["ExpertOptions", "KvOptions", "Session", "Training", "offload", "open_machine", "token_shares", *_errors]

_MODULES = {
    "ExpertOptions": "offload.moe.options",
    "KvOptions": "offload.kv.options",
    "Session": "offload.session.session",
    "Training": "offload.training.options",
    "offload": "offload.api",
    "open_machine": "offload.runtime.machine",
    "token_shares": "offload.training.weighting",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'offload' has no attribute {name!r}")
    with held_collector():
        value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
