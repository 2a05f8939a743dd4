"""The errors that offload raises on purpose; all are an `OffloadError`."""

from offload.storage.errors import *  # noqa: F403
from offload.storage.errors import __all__ as __all__
