"""A file that this process writes again and again: optimizer state, trained weights, what layers were given."""

import errno
import fcntl
import os
import stat
import zlib
from concurrent.futures import ThreadPoolExecutor

from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES, align_up
from offload.storage.errors import DiskFolderError, DiskFull, OffloadError, ReadError, gib
from offload.storage.host_buffer import HostBuffer
from offload.storage.io_engines.posix import direct_io_unit_bytes
from offload.storage.whole_file import without_name

_CHECKED_BYTES = 64 << 20
"""Bytes that one checksum covers."""

_CHUNK_BYTES = 4 << 20
_CHECK_THREADS = 2

_NOT_LINKED = (errno.EXDEV, errno.ENOENT, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)
"""Another filesystem, or one that gives a file without a name none later."""


class StateFile:
    """A file read and written in whole pages at any place, by several threads at once.

    O_DIRECT where the filesystem takes it; else through the page cache, and dropped from it. Made by `new` or `open`.

    Attributes:
        path: leads to it as long as it is open.
        nbytes: a multiple of 4 KiB.
        direct: False where the filesystem refuses O_DIRECT.
    """

    def __init__(self, descriptor: int, path: str) -> None:
        self.path = path
        self.nbytes = os.fstat(descriptor).st_size // BLOCK_ALIGNMENT_BYTES * BLOCK_ALIGNMENT_BYTES
        self._descriptor = descriptor
        self.direct = _take_direct(descriptor)
        self._folder = ""

    @classmethod
    def new(cls, folder: str, nbytes: int = 0) -> "StateFile":
        """A file without a name, which vanishes with the process, however that ends, unless `link` gives it one.

        Args:
            folder: on whose filesystem it is.
            nbytes: rounded up to whole pages; room for all of it is set aside, and bytes never written read as zero.

        Raises:
            DiskFull: if there is no room for it.
            DiskFolderError: if nothing can be written there.
        """
        descriptor = without_name(folder)
        file = cls(descriptor, f"/proc/self/fd/{descriptor}")
        file._folder = folder
        try:
            file.reserve(nbytes)
        except OffloadError:
            file.close()
            raise
        return file

    @classmethod
    def open(cls, path: str) -> "StateFile":
        """A file that is there, to be read. A lock tells other processes that it is in use, and goes with this one.

        Raises:
            DiskFolderError: if it is no regular file (a link to one is none), cannot be opened, or another process uses it.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise DiskFolderError(f"{path} cannot be read: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise DiskFolderError(f"{path} is no regular file")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise DiskFolderError(f"{path} is in use by another process") from error
        except OSError:
            # A filesystem without locks.
            pass
        except OffloadError:
            os.close(descriptor)
            raise
        return cls(descriptor, path)

    def link(self, path: str) -> bool:
        """Give the file a name, under which it stays when this process ends.

        Returns:
            False if its filesystem could not: then the name is a copy's.

        Raises:
            DiskFull: if there is no room for a copy; nothing is left behind then.
        """
        try:
            # From the descriptor; without `src_dir_fd`, Python would link the symbolic link in /proc.
            os.link(f"/proc/self/fd/{self._descriptor}", path, src_dir_fd=self._descriptor)
            return True
        except OSError as error:
            if error.errno not in _NOT_LINKED:
                raise DiskFolderError(f"{path} cannot be written: {error.strerror}") from error
        self._copy(path)
        return False

    def _copy(self, path: str) -> None:
        buffer = HostBuffer(_CHUNK_BYTES)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            for start in range(0, self.nbytes, _CHUNK_BYTES):
                chunk = buffer.memory[: min(_CHUNK_BYTES, self.nbytes - start)]
                self.read(start, chunk)
                _write_fully(descriptor, path, chunk, start)
                os.fdatasync(descriptor)
                os.posix_fadvise(descriptor, start, len(chunk), os.POSIX_FADV_DONTNEED)
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(descriptor)

    def checksums(self, nbytes: int) -> list[int]:
        """CRC-32 of what is on disk: one for every 64 MiB of the first `nbytes`.

        Raises:
            ReadError: if the system refuses, or the file is shorter.
        """
        starts = range(0, nbytes, _CHECKED_BYTES)
        with ThreadPoolExecutor(_CHECK_THREADS, "offload-checksum") as threads:
            return list(threads.map(lambda start: self._checksum(start, min(start + _CHECKED_BYTES, nbytes)), starts))

    def _checksum(self, start: int, end: int) -> int:
        buffer, found = HostBuffer(_CHUNK_BYTES), 0
        for offset in range(start, end, _CHUNK_BYTES):
            chunk = buffer.memory[: min(_CHUNK_BYTES, end - offset)]
            self.read(offset, chunk)
            found = zlib.crc32(chunk, found)
        return found

    def reserve(self, nbytes: int) -> None:
        """Make it at least so large.

        Raises:
            DiskFull: if there is no room.
        """
        nbytes = align_up(nbytes, BLOCK_ALIGNMENT_BYTES)
        if nbytes > self.nbytes:
            try:
                os.posix_fallocate(self._descriptor, self.nbytes, nbytes - self.nbytes)
            except OSError as error:
                raise _full(self._folder or self.path, nbytes, error) from error
            self.nbytes = nbytes

    def read(self, offset: int, memory: memoryview) -> None:
        """Fill `memory`. Offsets, sizes and addresses are multiples of 4 KiB.

        Raises:
            ReadError: if the system refuses, or the file is shorter.
        """
        done = 0
        while done < len(memory):
            try:
                count = os.preadv(self._descriptor, [memory[done:]], offset + done)
            except OSError as error:
                raise ReadError(f"reading {self.path} at byte {offset + done:,} failed: {error.strerror}") from error
            if count == 0:
                raise ReadError(f"{self.path} ends at byte {offset + done:,}: it was cut short while in use")
            done += count
        self._forget(offset, len(memory))

    def write(self, offset: int, memory: memoryview) -> None:
        """Write `memory`; aligned as for `read`.

        Raises:
            DiskFull: if there is no room.
        """
        _write_fully(self._descriptor, self._folder or self.path, memory, offset)
        if not self.direct:
            os.fdatasync(self._descriptor)
        self._forget(offset, len(memory))

    def sync(self) -> None:
        """What was written survives a loss of power."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _forget(self, offset: int, nbytes: int) -> None:
        if not self.direct:
            os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


def _take_direct(descriptor: int) -> bool:
    """Switch to O_DIRECT; False if the filesystem refuses."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError:
        return False
    if direct_io_unit_bytes(descriptor) <= BLOCK_ALIGNMENT_BYTES:
        return True
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return False


def _write_fully(descriptor: int, path: str, memory: memoryview, offset: int) -> None:
    done = 0
    while done < len(memory):
        try:
            done += os.pwrite(descriptor, memory[done:], offset + done)
        except OSError as error:
            raise _full(path, len(memory), error) from error


def _full(path: str, nbytes: int, error: OSError) -> Exception:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFolderError(f"{path} cannot be written: {error.strerror}")
    status = os.statvfs(path if os.path.isdir(path) else os.path.dirname(path) or ".")
    return DiskFull(
        f"{gib(nbytes)} are to be written to {path}, and {gib(status.f_bavail * status.f_frsize)} is free there; free some "
        "space, or name another folder with --disk (disk_dir=)"
    )
