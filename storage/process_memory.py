"""What this process holds, as the kernel counts it."""

import mmap
import os
import resource
from functools import cache

import psutil


def process_bytes() -> int:
    """Memory that only this process has: Python, torch, and whatever is loaded."""
    lines = _read("status").splitlines()
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith((b"RssAnon:", b"RssShmem:"))]
    return sum(sizes) if sizes else int(psutil.Process().memory_info().rss)


def anonymous_bytes() -> int:
    """The same without shared memory, in a third of the time."""
    _, resident, shared, *_ = map(int, _read("statm").split())
    return (resident - shared) * mmap.PAGESIZE


def mapped_bytes() -> int:
    """Pages of files that are in memory for this process: code of Python and torch above all."""
    return sum(int(line.split()[1]) * 1024 for line in _read("status").splitlines() if line.startswith(b"RssFile:"))


def major_faults() -> int:
    """Pages that this process had to wait for the disk for, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def _read(name: str) -> bytes:
    return os.pread(_opened(name, os.getpid()), 1 << 14, 0)


@cache
def _opened(name: str, process: int) -> int:
    """A file of /proc that stays open: this is read in every pass, where Ctrl-C may come between opening and closing."""
    return os.open(f"/proc/self/{name}", os.O_RDONLY | os.O_CLOEXEC)
