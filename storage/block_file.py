"""Tensors that no checkpoint file holds as they are needed, written once to disk and streamed from there.

Layout: the tensors one after another, each aligned, then a JSON index of them, then its length and a magic number.
A file that is kept for the next run is found by a key that names everything its content depends on; it appears under
its name only when it is whole.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES, TENSOR_ALIGNMENT_BYTES, FileRange, TensorSpec, align_up
from offload.storage.checkpoint import StoredTensor
from offload.storage.errors import CorruptCheckpoint, DiskFolderError, DiskFull, gib
from offload.storage.whole_file import PARTIAL, without_name

_MAGIC = b"OFFLOAD1"
_SUFFIX = ".blocks"
_LEFTOVER = re.compile(r"[0-9a-f]{32}\.[a-z0-9_]{8}" + re.escape(PARTIAL))
"""A key, and what `mkstemp` adds to it."""

_BLOCK_ALIGNED_FROM_BYTES = 64 * 1024
_WRITE_BYTES = 16 << 20
_SYNC_BYTES = 64 << 20


def key_of(facts: dict[str, Any]) -> str:
    """A file name for whatever `facts` determines; any change in them gives another name."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def check_folder(folder: str) -> None:
    """Raise DiskFolderError unless block files can be written in `folder`."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise DiskFolderError(f"the disk folder {folder} is a file; name a folder")
    if not os.path.isdir(folder):
        raise DiskFolderError(f"the disk folder {folder} does not exist; make it, or name another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DiskFolderError(f"the disk folder {folder} cannot be written; name another")


def make_folder(folder: str) -> None:
    """Make a folder in one that exists, if it is not there. Raises DiskFolderError as `check_folder` does."""
    try:
        os.mkdir(folder)
    except OSError:
        # There already, or not to be made: that is told next.
        pass
    check_folder(folder)


def spill_folder() -> str:
    """Where weights are spilled that nobody named a folder for: the system's temporary folder, if that is on a disk.

    Raises:
        DiskFolderError: if it is in memory, and `/var/tmp` is too.
    """
    for folder in (tempfile.gettempdir(), "/var/tmp"):
        if os.path.isdir(folder) and os.access(folder, os.W_OK) and _filesystem(folder) not in ("tmpfs", "ramfs"):
            return folder
    raise DiskFolderError(
        f"weights must be spilled to disk, and {tempfile.gettempdir()} is in memory; name a folder on a disk (disk_dir=)"
    )


def _filesystem(folder: str) -> str:
    real = os.path.realpath(folder)
    mounts = [
        part for part in psutil.disk_partitions(all=True) if os.path.commonpath([real, part.mountpoint]) == part.mountpoint
    ]
    return str(max(mounts, key=lambda part: len(part.mountpoint)).fstype) if mounts else ""


class BlockFileWriter:
    """Writes one block file.

    Args:
        folder: where.
        key: the name under which the whole file is kept; None for a file without a name, which vanishes with the
            process however that ends.
    """

    def __init__(self, folder: str, key: str | None = None) -> None:
        check_folder(folder)
        self._folder = folder
        self._key = key
        if key is None:
            self._descriptor = without_name(folder)
            self._partial = f"/proc/self/fd/{self._descriptor}"
        else:
            _remove_leftovers(folder)
            self._descriptor, self._partial = _begin(folder, key)
        self._end = 0
        self._dirty_bytes = 0
        self._entries: dict[str, dict[str, Any]] = {}

    @property
    def nbytes(self) -> int:
        return self._end

    def add(self, name: str, tensor: torch.Tensor, group: str = "") -> None:
        """Append a tensor (any shape, on the CPU); `group` is kept beside it.

        Raises:
            DiskFull: if the disk has no room; what was added before can still be read through `so_far`.
        """
        content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        large = content.numel() >= _BLOCK_ALIGNED_FROM_BYTES
        start = align_up(self._end, BLOCK_ALIGNMENT_BYTES if large else TENSOR_ALIGNMENT_BYTES)
        memory = memoryview(content.numpy())  # type: ignore[arg-type]
        self._write(memory, start)
        self._entries[name] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "offset": start,
            "crc32": zlib.crc32(memory),
            "group": group,
        }
        self._end = start + len(memory)

    def add_parts(
        self, name: str, dtype: torch.dtype, shape: Sequence[int], parts: Iterable[torch.Tensor], group: str = ""
    ) -> None:
        """Append a tensor whose content comes piece by piece, so that it is never in memory as a whole.

        Args:
            parts: of its first dimension, on the CPU.

        Raises:
            DiskFull: as `add` does.
        """
        start = end = align_up(self._end, BLOCK_ALIGNMENT_BYTES)
        checksum = 0
        for part in parts:
            memory = memoryview(part.detach().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            self._write(memory, end)
            checksum = zlib.crc32(memory, checksum)
            end += len(memory)
        self._entries[name] = {
            "dtype": str(dtype).removeprefix("torch."),
            "shape": list(shape),
            "offset": start,
            "crc32": checksum,
            "group": group,
        }
        self._end = end

    def finish(self) -> "BlockFile":
        """Make the file whole, and visible if it has a key."""
        index = json.dumps(self._entries).encode()
        start = align_up(self._end, TENSOR_ALIGNMENT_BYTES)
        self._write(memoryview(index + struct.pack("<Q", len(index)) + _MAGIC), start)
        os.fsync(self._descriptor)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if self._key is None:
            return BlockFile(self._partial, self._entries, self._descriptor)
        final = path_of(self._folder, self._key)
        try:
            # Not renamed over a file that another process made meanwhile, and uses.
            os.link(self._partial, final)
        except FileExistsError:
            pass
        except OSError:
            # A filesystem without hard links.
            os.rename(self._partial, final)
        self.abandon()
        kept = BlockFile.open(self._folder, self._key)
        assert kept is not None
        return kept

    def so_far(self) -> "BlockFile":
        """The tensors added until now, as long as this writer is not abandoned."""
        return BlockFile(f"/proc/self/fd/{self._descriptor}", self._entries, None)

    def abandon(self) -> None:
        """Remove the unfinished file."""
        if self._key is not None:
            Path(self._partial).unlink(missing_ok=True)
        os.close(self._descriptor)

    def _write(self, memory: memoryview, start: int) -> None:
        done = 0
        while done < len(memory):
            try:
                done += os.pwrite(self._descriptor, memory[done : done + _WRITE_BYTES], start + done)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise DiskFull(
                    f"{self._folder} is full after {gib(start + done)} of weights were written there; the unfinished file "
                    "is removed. Free some space, or name another folder with --disk (disk_dir=)."
                ) from error
        self._dirty_bytes += len(memory)
        if self._dirty_bytes >= _SYNC_BYTES:
            self._drop_pages()

    def _drop_pages(self) -> None:
        """Written pages would otherwise be charged to this process's memory limit until the kernel cleans them."""
        os.fdatasync(self._descriptor)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._dirty_bytes = 0


class BlockFile:
    """A whole block file: its tensors' places, and views of them.

    Attributes:
        path: to be opened by readers; names an open descriptor if the file has no name of its own.
        tensors: by name.
        groups: the names of the tensors that were added with each group.
    """

    def __init__(self, path: str, entries: dict[str, dict[str, Any]], descriptor: int | None) -> None:
        self.path = path
        self._descriptor = descriptor
        self.tensors = {name: _stored(path, name, entry) for name, entry in entries.items()}
        self.groups: dict[str, list[str]] = {}
        for name, entry in entries.items():
            self.groups.setdefault(entry["group"], []).append(name)
        self._storage: Any = None

    @classmethod
    def open(cls, folder: str, key: str) -> "BlockFile | None":
        """The file kept under `key`; None if there is none.

        Raises:
            CorruptCheckpoint: if there is one and it is not whole.
        """
        path = path_of(folder, key)
        try:
            with open(path, "rb") as file:
                entries = _read_index(path, file)
        except FileNotFoundError:
            return None
        return cls(path, entries, None)

    def view(self, name: str) -> torch.Tensor:
        """The tensor as a private writable view of the file: no memory until it is read, its own storage."""
        stored = self.tensors[name]
        start = stored.range.offset
        with torch.inference_mode(False):
            if not stored.range.nbytes:
                return torch.empty(stored.spec.shape, dtype=getattr(torch, stored.spec.dtype))
            if self._storage is None:
                # Private: what a user writes to a weight must not reach the file.
                self._storage = torch.UntypedStorage.from_file(self.path, False, os.path.getsize(self.path))
            content = torch.empty(0, dtype=torch.uint8).set_(self._storage[start : start + stored.range.nbytes])
            view: torch.Tensor = content.view(getattr(torch, stored.spec.dtype)).view(stored.spec.shape)
            return view

    def close(self) -> None:
        """Give the descriptor back; views stay valid."""
        self._storage = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def path_of(folder: str, key: str) -> str:
    return os.path.join(folder, key + _SUFFIX)


def _stored(path: str, name: str, entry: dict[str, Any]) -> StoredTensor:
    spec = TensorSpec(name, entry["dtype"], tuple(entry["shape"]))
    return StoredTensor(spec, FileRange(path, entry["offset"], spec.nbytes, entry["crc32"]))


def _read_index(path: str, file: Any) -> dict[str, dict[str, Any]]:
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(size - 16)
        length, magic = struct.unpack("<Q8s", file.read(16))
        if magic != _MAGIC or length > size:
            raise ValueError("no index at its end")
        file.seek(size - 16 - length)
        entries: dict[str, dict[str, Any]] = json.loads(file.read(length))
        return entries
    except (ValueError, OSError, struct.error) as error:
        raise CorruptCheckpoint(f"{path} is not a whole block file ({error}); delete it, it is made again") from error


def _begin(folder: str, key: str) -> tuple[int, str]:
    """An unfinished file, open and locked: the lock tells others that it is being written, and goes with the process."""
    while True:
        descriptor, partial = tempfile.mkstemp(prefix=f"{key}.", suffix=PARTIAL, dir=folder)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, partial
        # Another process took it for a leftover before it was locked.
        os.close(descriptor)


def _remove_leftovers(folder: str) -> None:
    """Delete unfinished files whose writer is gone: nobody holds their lock."""
    for entry in os.scandir(folder):
        if not _LEFTOVER.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
            continue
        try:
            descriptor = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(entry.path)
        except OSError:
            pass
        finally:
            os.close(descriptor)
