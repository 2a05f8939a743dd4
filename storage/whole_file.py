"""Files that are under a name only when they are whole, or never."""

import errno
import os
import re
import tempfile
from pathlib import Path

from offload.storage.errors import DiskFolderError

PARTIAL = ".offload-partial"
"""How the name of a file ends that this project has not finished writing; no other program's does."""


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path`, durably and at once: a reader sees the old content or the new one.

    Raises:
        OSError: if it cannot be written; what was there stays.
    """
    descriptor, partial = tempfile.mkstemp(prefix=f"{path.name}.", suffix=PARTIAL, dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def keep_text(path: Path, text: str, most_files: int) -> None:
    """Write a file of a cache, if the disk lets us; of its folder's JSON files the oldest go, so that `most_files` stay."""
    try:
        if path.exists() and path.read_text(encoding="utf-8") == text:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        others = sorted((other for other in path.parent.glob("*.json") if other != path), key=lambda item: item.stat().st_mtime)
        for other in others[: max(0, len(others) - most_files + 1)]:
            other.unlink(missing_ok=True)
        replace_text(path, text)
    except OSError:
        pass


def sync_folder(folder: Path) -> None:
    """Names in `folder` survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_partial_of(name: str, whole: str) -> bool:
    """True if `replace_text` left `name` behind, killed while it wrote `whole`."""
    return re.fullmatch(re.escape(whole) + r"\.[a-z0-9_]{8}" + re.escape(PARTIAL), name) is not None


def without_name(folder: str) -> int:
    """A descriptor of a new file that vanishes with the process, however that ends.

    Raises:
        DiskFolderError: if nothing can be written to the folder.
    """
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise DiskFolderError(f"{folder} cannot be written: {error.strerror}") from error
    # A filesystem on which every file has a name at first.
    try:
        descriptor, path = tempfile.mkstemp(prefix="offload-", dir=folder)
    except OSError as error:
        raise DiskFolderError(f"{folder} cannot be written: {error.strerror}") from error
    os.unlink(path)
    return descriptor
