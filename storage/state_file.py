"""A file that this process writes again and again: optimizer states, trained weights, what layers were given."""

import errno
import fcntl
import os

from storage.blocks import BLOCK_ALIGNMENT_BYTES, align_up
from storage.engines.posix import direct_io_unit_bytes
from storage.errors import DiskFolderError, DiskFull, ReadError, gib


class StateFile:
    """A file of fixed size, read and written in whole pages at any place, by several threads at once.

    O_DIRECT where the filesystem takes it; else through the page cache, and dropped from it. A lock tells other processes
    that it is in use, and goes with this one.

    Args:
        path: made if it is not there, with room for all of it set aside; bytes never written read as zero.
        nbytes: rounded up to whole pages.

    Raises:
        DiskFull: if there is no room for it; nothing is left behind then.
        DiskFolderError: if it cannot be opened, or another process uses it.
    """

    def __init__(self, path: str, nbytes: int) -> None:
        self.path = path
        self.nbytes = align_up(nbytes, BLOCK_ALIGNMENT_BYTES)
        new = not os.path.exists(path)
        self.direct = True
        try:
            self._descriptor = _open(path, os.O_DIRECT)
            self.direct = direct_io_unit_bytes(self._descriptor) <= BLOCK_ALIGNMENT_BYTES
            if not self.direct:
                os.close(self._descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise DiskFolderError(f"{path} cannot be written: {error.strerror}") from error
            self.direct = False
        if not self.direct:
            self._descriptor = _open(path, 0)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise DiskFolderError(f"{path} is in use by another process") from error
        try:
            if self.nbytes:
                os.posix_fallocate(self._descriptor, 0, self.nbytes)
        except OSError as error:
            os.close(self._descriptor)
            if new:
                os.unlink(path)
            raise _full(path, self.nbytes, error) from error

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
                raise _full(self.path, nbytes, error) from error
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
        done = 0
        while done < len(memory):
            try:
                done += os.pwrite(self._descriptor, memory[done:], offset + done)
            except OSError as error:
                raise _full(self.path, len(memory), error) from error
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


def _open(path: str, flags: int) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)


def _full(path: str, nbytes: int, error: OSError) -> Exception:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFolderError(f"{path} cannot be written: {error.strerror}")
    status = os.statvfs(os.path.dirname(path) or ".")
    return DiskFull(
        f"{path} takes {gib(nbytes)}, and {gib(status.f_bavail * status.f_frsize)} is free there; free some space, or name "
        "another folder with --disk (disk_dir=)"
    )


def remove_unlocked(path: str) -> None:
    """Delete a state file, unless a process uses it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except OSError:
        pass
    finally:
        os.close(descriptor)
