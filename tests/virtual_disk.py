"""A disk and a compute of known slowness, on a clock that nobody's machine disturbs."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from offload.storage.transfer import Link, Transfer

_PATIENCE_SECONDS = 60


class VirtualDisk:
    """Reads end when the clock says so, one after another; the clock moves while layers compute, and while they wait.

    Attributes:
        now: seconds since it began.
        reading, computing, stalled: of these, those in which a read was under way, a layer computed, and one stood still.
        waits: how often one stood still.
    """

    def __init__(self, link: Link, bytes_per_second: float) -> None:
        self.now = self.reading = self.computing = self.stalled = 0.0
        self.waits = 0
        self._link = link
        self._rate = bytes_per_second
        self._free_at = 0.0
        self._deadlines: list[float] = []
        self._moved = threading.Condition()

    def read(self, nbytes: int) -> None:
        """Called by the link's threads, when a read is done: it ends at its time."""
        with self._moved:
            seconds = nbytes / self._rate
            self._free_at = max(self.now, self._free_at) + seconds
            self.reading += seconds
            deadline = self._free_at
            self._deadlines.append(deadline)
            self._moved.wait_for(lambda: self.now >= deadline, _PATIENCE_SECONDS)
            self._deadlines.remove(deadline)

    def compute(self, seconds: float) -> None:
        """A layer computes."""
        self.computing += seconds
        target = self.now + seconds
        self._settle()
        while (next_end := self._next_end()) is not None and next_end <= target:
            self._move_to(next_end)
        self._move_to(target)

    def wait(self, transfer: Transfer) -> None:
        """A layer needs what is on its way."""
        self._settle()
        if transfer._over.wait(0.02):
            return
        self.waits += 1
        begun = self.now
        while not transfer._over.wait(0.02):
            next_end = self._next_end()
            if next_end is not None:
                self._move_to(next_end)
        self.stalled += self.now - begun

    def _next_end(self) -> float | None:
        with self._moved:
            return min((deadline for deadline in self._deadlines if deadline > self.now), default=None)

    def _move_to(self, moment: float) -> None:
        with self._moved:
            self.now = max(self.now, moment)
            self._moved.notify_all()
        self._settle()

    def _settle(self) -> None:
        """Until every thread of the link has nothing to do, or waits for the clock."""
        until = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < until:
            with self._link._lock, self._moved:
                ahead = [deadline for deadline in self._deadlines if deadline > self.now]
                active, queued = self._link._active_parts, bool(self._link._queue)
                if len(ahead) == len(self._deadlines) == active and (not queued or active == self._link.threads):
                    return
            time.sleep(1e-4)
        raise AssertionError("the link's threads neither wait for the clock nor have nothing to do")


@contextmanager
def virtual_disk(session: Any, monkeypatch: Any, bytes_per_second: float) -> Iterator[VirtualDisk]:
    """The session's disk, as long as the context lasts."""
    host = session.machine.host
    disk = VirtualDisk(host.reads, bytes_per_second)
    real_read, real_wait = host.engine.read, Transfer.wait

    def read(path: str, file_offset: int, memory: memoryview, needed_bytes: int) -> None:
        real_read(path, file_offset, memory, needed_bytes)
        disk.read(len(memory))

    def wait(transfer: Transfer) -> Any:
        disk.wait(transfer)
        return real_wait(transfer)

    with monkeypatch.context() as patched:
        patched.setattr(host.engine, "read", read)
        patched.setattr(Transfer, "wait", wait)
        try:
            yield disk
        finally:
            # What was prefetched arrives at once.
            disk._rate = float("inf")
            disk._move_to(float("inf"))
