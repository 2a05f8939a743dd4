"""Every error that offload raises on purpose. Torch-free.

Each message says what was asked, what there is, and what to change.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "BudgetExceeded",
    "BudgetTooSmall",
    "CheckpointChanged",
    "CheckpointError",
    "ConfigError",
    "CorruptCheckpoint",
    "DeviceFull",
    "DiskFolderError",
    "DiskFull",
    "MissingShard",
    "OffloadError",
    "PlanError",
    "PlatformError",
    "ProfileError",
    "ReadError",
    "SessionError",
    "StaleSlot",
    "TrainingError",
    "UnsupportedCheckpoint",
]
"""The errors, without the helpers that word them."""


def gib(count: int, at_least: bool = False) -> str:
    """A byte count for people: `1.50 GiB`, `12.3 MiB`, `512 B`.

    Args:
        at_least: round up, so that what is printed is enough.
    """
    for unit, size, digits in (("GiB", 1 << 30, 2), ("MiB", 1 << 20, 1), ("KiB", 1 << 10, 1)):
        if count >= size:
            value = math.ceil(count / size * 10**digits) / 10**digits if at_least else count / size
            return f"{value:.{digits}f} {unit}"
    return f"{count} B"


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number of things for people: `1 block`, `3 blocks`, `2 batches`.

    Args:
        one, many: what they are called; many is `one` with an s where it is not given.
    """
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def duration(seconds: float) -> str:
    """A time for people: `1.25 s`, `13.0 ms`, `40 us`."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


class OffloadError(Exception):
    """The root of the tree: catch this to catch everything that offload raises on purpose."""


@contextmanager
def foreign_file(what: str, kind: type[OffloadError]) -> Iterator[None]:
    """While a library reads a file that somebody gave: what it raises, of whatever type, is an error of ours in one line.

    Args:
        what: cannot be used, and why: `config.json cannot be used`.
    """
    try:
        yield
    except (OffloadError, MemoryError):
        raise
    except RecursionError as error:
        raise kind(f"{what} (it is nested too deeply)") from error
    except Exception as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise kind(f"{what} ({said or type(error).__name__})") from error


class ConfigError(OffloadError, ValueError):
    """What the user asked for contradicts itself or cannot be read."""


class ProfileError(ConfigError):
    """A hardware profile that is broken, or of another machine."""


class PlanError(ConfigError):
    """A plan that cannot be read, or that does not match the model."""


class PlatformError(OffloadError):
    """This operating system lacks what offload stands on."""


class BudgetTooSmall(OffloadError):
    """No plan fits the budget. Nothing was loaded.

    Attributes:
        least_bytes: the smallest budget of that tier with which the same call works.
        of_host: it is the budget of CPU memory beside a device with memory of its own.
    """

    def __init__(self, message: str, least_bytes: int, of_host: bool = False) -> None:
        super().__init__(message)
        self.least_bytes = least_bytes
        self.of_host = of_host


class BudgetExceeded(OffloadError):
    """A running job needs more of a tier than its budget allows, and nothing is left to give up.

    Attributes:
        least_bytes: the smallest budget of that tier with which it goes on; None where that is not known.
    """

    def __init__(self, message: str, least_bytes: int | None = None) -> None:
        super().__init__(message)
        self.least_bytes = least_bytes


class DeviceFull(OffloadError):
    """The device has no memory left for what its budget allows: something else took it."""


class CheckpointError(OffloadError):
    """The checkpoint cannot be used as it is."""


class CorruptCheckpoint(CheckpointError):
    """A safetensors or block file is truncated, unreadable, or fails its checksum."""


class MissingShard(CheckpointError):
    """The index names a file that is not there."""


class CheckpointChanged(CheckpointError):
    """A file that weights are streamed from was changed while it was in use."""


class UnsupportedCheckpoint(CheckpointError):
    """A format, dtype or quantisation that cannot be streamed."""


class DiskFolderError(OffloadError):
    """The disk folder does not exist, or cannot be written."""


class DiskFull(OffloadError):
    """Writing a block file ran out of space; the unfinished file was removed."""


class ReadError(OffloadError):
    """Reading weights failed in the middle of a run."""


class StaleSlot(OffloadError):
    """Something kept a reference into a slot that holds other bytes by now."""


class SessionError(OffloadError, RuntimeError):
    """An operation that cannot be done to a model while it is offloaded."""


class TrainingError(OffloadError, RuntimeError):
    """Training cannot go on: the loss is no number, say."""
