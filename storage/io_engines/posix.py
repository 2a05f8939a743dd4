"""preadv with O_DIRECT: the disk's own speed, without filling the page cache."""

import ctypes
import errno
import mmap
import os
import struct
from dataclasses import dataclass, replace

from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES, align_up
from offload.storage.errors import CheckpointChanged, ReadError
from offload.storage.fingerprint import fingerprint

_STATX_DIOALIGN = 0x2000
_AT_EMPTY_PATH = 0x1000
_STATX_SIZE = 256
_DIO_ALIGN_AT = 152  # struct statx: stx_dio_mem_align, stx_dio_offset_align


@dataclass(frozen=True, slots=True)
class _OpenFile:
    descriptor: int
    buffered: int
    direct: bool
    identity: "_Identity | None"
    """As it was when it was opened; None if it may change."""


@dataclass(frozen=True, slots=True)
class _Identity:
    """What tells that a file is the one it was.

    Attributes:
        kept: size, inode and time of the last write, which whoever overwrites a file can set back.
        changed_at: of anything, attributes included: nobody can set it.
    """

    kept: tuple[int, int, int]
    changed_at: int
    fingerprint: str

    @classmethod
    def of(cls, descriptor: int) -> "_Identity":
        status = os.fstat(descriptor)
        return cls(_kept(status), status.st_ctime_ns, fingerprint(descriptor))


class PosixEngine:
    """Reads with `preadv` on O_DIRECT descriptors; where the filesystem refuses, buffered and dropped from the cache.

    Args:
        direct: False to read through the page cache on purpose.
    """

    name = "posix"

    def __init__(self, *, direct: bool = True) -> None:
        self.unit_bytes = BLOCK_ALIGNMENT_BYTES
        self.fallbacks: list[str] = []
        self._direct = direct
        self._files: dict[str, _OpenFile] = {}

    def open(self, path: str, own: bool = False) -> None:
        if path in self._files:
            return
        descriptor, direct = self._open_descriptor(path)
        buffered = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if direct else descriptor
        if direct:
            os.posix_fadvise(buffered, 0, 0, os.POSIX_FADV_RANDOM)
        self._files[path] = _OpenFile(descriptor, buffered, direct, None if own else _Identity.of(buffered))

    def read(self, path: str, file_offset: int, memory: memoryview, needed_bytes: int) -> None:
        file = self._files[path]
        _read_fully(file.descriptor, path, file_offset, memory, needed_bytes, self.unit_bytes)
        if not file.direct and self._direct:
            os.posix_fadvise(file.descriptor, file_offset, len(memory), os.POSIX_FADV_DONTNEED)

    def read_unaligned(self, path: str, file_offset: int, memory: memoryview) -> None:
        _read_fully(self._files[path].buffered, path, file_offset, memory, len(memory), 1)

    def check_unchanged(self) -> None:
        for path, file in self._files.items():
            if file.identity is None:
                continue
            try:
                now = os.stat(path)
            except OSError as error:
                raise _changed(path, "is gone") from error
            if _kept(now) != file.identity.kept:
                raise _changed(path, "was changed")
            if now.st_ctime_ns != file.identity.changed_at:
                # Renamed, linked, or overwritten with its time set back: only the content tells.
                again = _Identity.of(file.buffered)
                if again.fingerprint != file.identity.fingerprint:
                    raise _changed(path, "was overwritten")
                self._files[path] = replace(file, identity=again)

    def forget(self, path: str) -> None:
        file = self._files.pop(path, None)
        if file is not None:
            for descriptor in {file.descriptor, file.buffered}:
                os.close(descriptor)

    def close(self) -> None:
        for path in list(self._files):
            self.forget(path)

    def _open_descriptor(self, path: str) -> tuple[int, bool]:
        if self._direct:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                if direct_io_unit_bytes(descriptor) <= self.unit_bytes and _direct_read_works(descriptor):
                    return descriptor, True
                os.close(descriptor)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise ReadError(f"cannot open {path}: {error.strerror}") from error
            self.fallbacks.append(
                f"{os.path.dirname(path)}: the filesystem refuses O_DIRECT, so reads go through the page cache "
                "and are dropped from it afterwards"
            )
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
        except OSError as error:
            raise ReadError(f"cannot open {path}: {error.strerror}") from error


def _read_fully(descriptor: int, path: str, file_offset: int, memory: memoryview, needed_bytes: int, unit_bytes: int) -> None:
    done = 0
    while done < needed_bytes:
        try:
            count = os.preadv(descriptor, [memory[done:]], file_offset + done)
        except OSError as error:
            raise ReadError(f"reading {path} at byte {file_offset + done:,} failed: {error.strerror}") from error
        if count == 0 or (done + count < needed_bytes and count < unit_bytes):
            raise ReadError(
                f"{path} ends at byte {file_offset + done + count:,}, and weights were to be read up to "
                f"{file_offset + needed_bytes:,}: it was cut short while in use"
            )
        # O_DIRECT cannot go on from the middle of a unit: an odd rest is read again.
        done += count if done + count >= needed_bytes else count - count % unit_bytes


def direct_io_unit_bytes(descriptor: int) -> int:
    """The unit that O_DIRECT takes on this file, from statx (Linux 6.1); 4 KiB where the kernel does not say."""
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "statx") or libc.statx(descriptor, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer):
        return BLOCK_ALIGNMENT_BYTES
    mask = struct.unpack_from("I", buffer, 0)[0]
    memory_unit, offset_unit = struct.unpack_from("II", buffer, _DIO_ALIGN_AT)
    if not mask & _STATX_DIOALIGN or not offset_unit:
        return BLOCK_ALIGNMENT_BYTES
    return align_up(max(memory_unit, offset_unit), BLOCK_ALIGNMENT_BYTES)


def _direct_read_works(descriptor: int) -> bool:
    """Some filesystems accept the flag at open and refuse the first read."""
    with mmap.mmap(-1, BLOCK_ALIGNMENT_BYTES) as page:
        try:
            with memoryview(page) as memory:
                os.preadv(descriptor, [memory], 0)
        except OSError:
            return False
    return True


def _kept(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_ino, status.st_mtime_ns


def _changed(path: str, what: str) -> CheckpointChanged:
    return CheckpointChanged(f"{path} {what} while its weights were in use; leave the context and load the model again")
