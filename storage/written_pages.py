"""Which memory of a private file mapping this process has written to: no longer the file's pages, but its own.

Asked of the kernel by the ioctl PAGEMAP_SCAN (Linux 6.7), which skips what was never touched; else by reading
`/proc/self/pagemap`, 8 bytes a page; see the kernel's pagemap.rst.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Iterator, Sequence

import numpy

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_SCAN = 0xC0606610
_ARGUMENT = struct.Struct("=12Q")
_FILE, _PRESENT, _SWAPPED = 1 << 2, 1 << 3, 1 << 4
_ENTRY_PRESENT, _ENTRY_SWAPPED, _ENTRY_FILE = (numpy.uint64(1 << bit) for bit in (63, 62, 61))
_ENTRIES_AT_ONCE = 1 << 20

Range = tuple[int, int]
"""Addresses of the first byte and of the one behind the last."""


def written(ranges: Sequence[Range]) -> list[bool] | None:
    """Tell of each range whether a page of it was written to; None where the system does not say (gVisor has no pagemap)."""
    try:
        descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return [_any(descriptor, *_pages_of(*item)) for item in ranges]
    except OSError:
        return None
    finally:
        os.close(descriptor)


def private_file_ranges() -> Iterator[Range]:
    """The private mappings of files, those of deleted ones too."""
    with open("/proc/self/maps") as file:
        for line in file:
            fields = line.split(maxsplit=5)
            if fields[1][3] == "p" and fields[4] != "0":
                begin, end = (int(part, 16) for part in fields[0].split("-"))
                yield begin, end


def _pages_of(begin: int, end: int) -> Range:
    return begin // PAGE_BYTES * PAGE_BYTES, -(-end // PAGE_BYTES) * PAGE_BYTES


def _any(descriptor: int, begin: int, end: int) -> bool:
    try:
        return _scanned(descriptor, begin, end)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
        return _read(descriptor, begin, end)


def _scanned(descriptor: int, begin: int, end: int) -> bool:
    """Ask for one page that is present or swapped, and is none of the file's."""
    found = bytearray(24)
    address = numpy.frombuffer(found, dtype=numpy.uint8).ctypes.data
    argument = bytearray(
        _ARGUMENT.pack(_ARGUMENT.size, 0, begin, end, 0, address, 1, 1, _FILE, _FILE, _PRESENT | _SWAPPED, _PRESENT)
    )
    return bool(fcntl.ioctl(descriptor, _SCAN, argument))


def _read(descriptor: int, begin: int, end: int) -> bool:
    for first in range(begin // PAGE_BYTES, end // PAGE_BYTES, _ENTRIES_AT_ONCE):
        count = min(_ENTRIES_AT_ONCE, end // PAGE_BYTES - first)
        entries = numpy.frombuffer(os.pread(descriptor, 8 * count, 8 * first), dtype=numpy.uint64)
        if len(entries) != count:
            raise OSError(errno.EIO, "/proc/self/pagemap is cut short")
        own = ((entries & _ENTRY_PRESENT) != 0) & ((entries & _ENTRY_FILE) == 0)
        if bool((own | ((entries & _ENTRY_SWAPPED) != 0)).any()):
            return True
    return False
