"""One queue a link: every copy is timed, counted, and waited for by whoever asked for it."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from offload.storage.arrival import Waits

Part = Callable[[], None]


class Transfer:
    """One block on its way over one link.

    A transfer consists of parts that worker threads run in any order, and of a finish that runs after the last of
    them. An error in either surfaces in `wait`, in the thread that needs the bytes.
    """

    def __init__(self, link: "Link", nbytes: int, parts: Sequence[Part], finish: Part | None, name: str = "") -> None:
        self.link = link
        self.nbytes = nbytes
        self.name = name
        self.begun_at = 0.0
        self.error: BaseException | None = None
        self._finish = finish
        self._parts_left = len(parts)
        self._cancelled = False
        self._over = threading.Event()
        self._then: Part | None = None

    @property
    def over(self) -> bool:
        """True once nothing of it runs any more, whether it succeeded or not."""
        return self._over.is_set()

    def wait(self) -> Waits:
        """Block until the bytes are there.

        Returns:
            Seconds spent waiting, for the link.

        Raises:
            Whatever a part or the finish raised.
        """
        waited = 0.0
        if not self._over.is_set():
            begun = time.perf_counter()
            self._over.wait()
            waited = time.perf_counter() - begun
        if self.error is not None:
            raise self.error
        return {self.link.name: waited}

    def cancel(self) -> None:
        """Skip the parts that have not begun and wait for those that have: the target may be reused afterwards."""
        self._cancelled = True
        self._over.wait()

    def hasten(self) -> None:
        """Somebody waits for it, or is about to: its parts that have not begun come before all others."""
        self.link._hasten(self)

    def when_over(self, then: Part) -> None:
        """Run `then` once, in a link thread or, if the transfer is over already, at once."""
        with self.link._lock:
            if not self._over.is_set():
                self._then = then
                return
        then()

    def _end(self) -> None:
        with self.link._lock:
            self._over.set()
            then = self._then
        if then is not None:
            then()

    def _run(self, part: Part) -> bool:
        """Run one part; True if it was the last of them."""
        if not self._cancelled and self.error is None:
            self._guarded(part)
        with self.link._lock:
            self._parts_left -= 1
            return self._parts_left == 0

    def _complete(self) -> bool:
        """Run the finish; True if the bytes arrived."""
        arrived = not self._cancelled and self.error is None
        if arrived and self._finish is not None:
            self._guarded(self._finish)
        return arrived and self.error is None

    def _guarded(self, step: Part) -> None:
        try:
            step()
        except BaseException as error:  # handed to the waiter, whatever it is
            self.error = error


Work = tuple[Transfer, Part]


class Link:
    """A first-in-first-out queue of transfers, served by a few threads; and one for what is not needed yet.

    Args:
        name: as the report prints it, such as `disk`.
        threads: how many parts are under way at once.
        on_transfer: told (link, name, begin, end, bytes) of each transfer that arrived.
    """

    def __init__(
        self,
        name: str,
        threads: int,
        on_transfer: Callable[[str, str, float, float, int], None] = lambda *transfer: None,
    ) -> None:
        self._on_transfer = on_transfer
        self.name = name
        self.threads = threads
        self.bytes_moved = 0
        self._busy_seconds = 0.0
        self._queue: deque[Work] = deque()
        self._background: deque[Work] = deque()
        """Served while the queue is empty."""
        self._active_parts = 0
        self._busy_since = 0.0
        self._closed = False
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        """There is something to do: a worker that takes a part wakes the next one, so that whoever submits wakes only one."""
        self._idle = threading.Condition(self._lock)
        self._workers = [
            threading.Thread(target=self._serve, name=f"offload-{name}-{index}", daemon=True) for index in range(threads)
        ]
        for thread in self._workers:
            thread.start()

    @property
    def busy_seconds(self) -> float:
        """Seconds during which at least one part was under way, the present ones included."""
        with self._lock:
            now = time.perf_counter() - self._busy_since if self._active_parts else 0.0
            return self._busy_seconds + now

    def wait_idle(self) -> None:
        """Block until nothing is queued or under way."""
        with self._idle:
            self._idle.wait_for(lambda: not self._queue and not self._background and not self._active_parts)

    def submit(self, nbytes: int, parts: Sequence[Part], finish: Part | None = None, name: str = "") -> Transfer:
        """Queue a transfer that counts as `nbytes` once it has arrived."""
        return self._submit(Transfer(self, nbytes, parts, finish, name), parts, self._queue.extend)

    def submit_first(self, nbytes: int, parts: Sequence[Part], name: str = "") -> Transfer:
        """Queue a transfer that somebody is waiting for already, before those that were queued ahead of need."""
        return self._submit(Transfer(self, nbytes, parts, None, name), parts[::-1], self._queue.extendleft)

    def submit_in_background(self, nbytes: int, parts: Sequence[Part], finish: Part | None = None, name: str = "") -> Transfer:
        """Queue a transfer that nobody needs yet: it gets on while nothing else is queued, or once it is hastened."""
        return self._submit(Transfer(self, nbytes, parts, finish, name), parts, self._background.extend)

    def _submit(self, transfer: Transfer, parts: Sequence[Part], queue: Callable[[Iterable[Work]], None]) -> Transfer:
        with self._work:
            if self._closed:
                raise RuntimeError(f"the {self.name} link is closed")
            queue((transfer, part) for part in parts)
            self._work.notify()
        return transfer

    def _hasten(self, transfer: Transfer) -> None:
        with self._work:
            first = [item for item in self._background if item[0] is transfer]
            if first:
                others = [item for item in self._background if item[0] is not transfer]
                self._background.clear()
                self._background.extend(others)
                self._queue.extendleft(reversed(first))

    def count(self, name: str, begin: float, end: float, nbytes: int) -> None:
        """Count bytes that another thread than the link's has moved, between two moments of `time.perf_counter()`."""
        with self._lock:
            self.bytes_moved += nbytes
        self._on_transfer(self.name, name, begin, end, nbytes)

    def close(self) -> None:
        """Finish what is queued, then end the threads."""
        with self._work:
            self._closed = True
            self._work.notify_all()
        for thread in self._workers:
            thread.join()

    def _serve(self) -> None:
        while True:
            with self._work:
                while not self._queue and not self._background and not self._closed:
                    self._work.wait()
                if not self._queue and not self._background:
                    return
                transfer, part = (self._queue or self._background).popleft()
                if self._queue or self._background:
                    self._work.notify()
                now = time.perf_counter()
                if self._active_parts == 0:
                    self._busy_since = now
                transfer.begun_at = transfer.begun_at or now
                self._active_parts += 1
            last = transfer._run(part)
            arrived = last and transfer._complete()
            self._end_part(transfer.nbytes if arrived else 0)
            if arrived:
                self._on_transfer(self.name, transfer.name, transfer.begun_at, time.perf_counter(), transfer.nbytes)
            if last:
                transfer._end()

    def _end_part(self, arrived_bytes: int) -> None:
        with self._idle:
            self.bytes_moved += arrived_bytes
            self._active_parts -= 1
            if self._active_parts == 0:
                self._idle.notify_all()
                self._busy_seconds += time.perf_counter() - self._busy_since
