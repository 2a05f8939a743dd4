"""A fresh control group with a hard memory limit, for one process at a time. Needs root; version 1 or 2."""

import json
import os
import subprocess
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")
_DISKS = Path("/sys/fs/cgroup/blkio")


def available() -> bool:
    """True if groups can be made here."""
    try:
        with MemoryGroup(1 << 30):
            return True
    except OSError:
        return False


class MemoryGroup:
    """Use as a context; the group is gone afterwards.

    Args:
        limit_bytes: what the processes in it may hold, page cache included; more kills them.
        disk_bytes_per_second: what they may read of the disk, O_DIRECT included (version 1 only); None for what it gives.
        folder: on that disk.
    """

    def __init__(self, limit_bytes: int, disk_bytes_per_second: int | None = None, folder: str = ".") -> None:
        version_1 = (_V1 / "memory.limit_in_bytes").exists()
        self._path = (_V1 if version_1 else _V2) / f"offload-{uuid.uuid4().hex[:12]}"
        self._limit_file = "memory.limit_in_bytes" if version_1 else "memory.max"
        self._anonymous = "rss" if version_1 else "anon"
        self._limit_bytes = limit_bytes
        self._disk = None if disk_bytes_per_second is None else _DISKS / self._path.name
        self._disk_limit = f"{_disk_of(folder)} {disk_bytes_per_second}"

    def __enter__(self) -> "MemoryGroup":
        self._path.mkdir()
        try:
            (self._path / self._limit_file).write_text(str(self._limit_bytes))
        except OSError:
            self._path.rmdir()
            raise
        if self._disk is not None:
            self._disk.mkdir()
            (self._disk / "blkio.throttle.read_bps_device").write_text(self._disk_limit)
        return self

    def __exit__(self, *exception: object) -> None:
        for group in (self._path, self._disk):
            if group is not None:
                _remove(group)

    def run(self, command: Sequence[str], **options: object) -> tuple[subprocess.CompletedProcess[str], int]:
        """Run a command in the group; what it did, and the most anonymous memory that it held, sampled."""

        def enter() -> None:
            for group in (self._path, self._disk):
                if group is not None:
                    (group / "cgroup.procs").write_text(str(os.getpid()))

        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=enter, **options
        )  # type: ignore[call-overload]
        peak = 0
        while True:
            try:
                out, err = process.communicate(timeout=0.05)
                return subprocess.CompletedProcess(command, process.returncode, out, err), peak
            except subprocess.TimeoutExpired:
                peak = max(peak, self.anonymous_bytes())

    def measure(self, command: Sequence[str]) -> dict[str, Any]:
        """Run a command whose last line is JSON: that, with the most anonymous memory that it held; or why it failed."""
        done, peak = self.run(command, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
        if done.returncode:
            return {"failed": f"exit status {done.returncode}: {done.stderr[-600:]}"}
        return {**json.loads(done.stdout.splitlines()[-1]), "peak_anonymous_bytes": peak}

    def anonymous_bytes(self) -> int:
        for line in (self._path / "memory.stat").read_text().splitlines():
            name, value = line.split()
            if name == self._anonymous:
                return int(value)
        raise RuntimeError(f"{self._path}/memory.stat tells no {self._anonymous}")


def _remove(group: Path) -> None:
    for _ in range(100):
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"{group} still has processes in it")


def _disk_of(folder: str) -> str:
    """The whole disk of a folder, as `major:minor`: a limit counts for no partition."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    parent = Path(f"/sys/dev/block/{number}").resolve().parent / "dev"
    return parent.read_text().strip() if parent.is_file() else number


def evict(folder: str) -> None:
    """Drop the files of a folder from the page cache: a cached page is charged to whoever touched it first."""
    for path in Path(folder).iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
