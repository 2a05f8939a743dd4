"""Run any transformers model on a device too small for it: `with offload("org/model", gpu_memory="8GiB") as session:`."""

from offload.api import offload
from offload.session import Session
from offload.training.options import Training
from offload.training.weighting import token_shares
from storage.errors import (
    BudgetExceeded,
    BudgetTooSmall,
    CheckpointChanged,
    CheckpointError,
    ConfigError,
    CorruptCheckpoint,
    DiskFolderError,
    DiskFull,
    MissingShard,
    OffloadError,
    PlanError,
    PlatformError,
    ProfileError,
    ReadError,
    SessionError,
    StaleSlot,
    TrainingError,
    UnsupportedCheckpoint,
)

__version__ = "0.1.0"

__all__ = [
    "BudgetExceeded",
    "BudgetTooSmall",
    "CheckpointChanged",
    "CheckpointError",
    "ConfigError",
    "CorruptCheckpoint",
    "DiskFolderError",
    "DiskFull",
    "MissingShard",
    "OffloadError",
    "PlanError",
    "PlatformError",
    "ProfileError",
    "ReadError",
    "Session",
    "SessionError",
    "StaleSlot",
    "Training",
    "TrainingError",
    "UnsupportedCheckpoint",
    "offload",
    "token_shares",
]
