"""The folder in the user's cache where this project keeps what it measured and counted."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$OFFLOAD_PROFILES`, else `offload` in the user's cache."""
    chosen = os.environ.get("OFFLOAD_PROFILES")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offload"
