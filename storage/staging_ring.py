"""Host buffers that bytes pass through between two tiers."""

import threading
from collections.abc import Callable, Sequence

from offload.storage.devices.base import Event
from offload.storage.host_buffer import HostBuffer


class StagingRing:
    """Buffers that are taken, filled, emptied and given back; each is made when it is first needed.

    Args:
        make: returns a new buffer of so many bytes.
        discard: lets go of a buffer.
        limit: the most buffers there may be; 0 for any number.
    """

    def __init__(
        self,
        make: Callable[[int], HostBuffer],
        discard: Callable[[HostBuffer], None] = lambda buffer: None,
        limit: int = 0,
    ) -> None:
        self._make, self._discard, self._limit = make, discard, limit
        self._free: list[HostBuffer] = []
        self._made: list[HostBuffer] = []
        self._after: dict[int, Event] = {}
        self._given = threading.Condition()

    @classmethod
    def of(cls, buffers: Sequence[HostBuffer]) -> "StagingRing":
        """A ring of buffers that somebody else made, and lets go of."""
        ring = cls(HostBuffer, limit=len(buffers))
        ring._free, ring._made = list(buffers), list(buffers)
        return ring

    def take(self, nbytes: int) -> HostBuffer | None:
        """The smallest free buffer of at least `nbytes`, or a new one; None if all are in use and no more may be made."""
        with self._given:
            large = [buffer for buffer in self._free if buffer.nbytes >= nbytes]
            fitting = min(large, key=lambda buffer: buffer.nbytes, default=None)
            if fitting is not None:
                self._free.remove(fitting)
                return fitting
            if self._limit and len(self._made) >= self._limit:
                if not self._free:
                    return None
                # All that are free are too small: one gives its place to a larger one.
                self._let_go(self._free.pop())
            buffer = self._make(nbytes)
            self._made.append(buffer)
            return buffer

    def wait_take(self, nbytes: int) -> HostBuffer:
        """The same, as soon as another thread gives one back."""
        while (buffer := self.take(nbytes)) is None:
            with self._given:
                self._given.wait_for(lambda: bool(self._free), timeout=1.0)
        return buffer

    def give(self, buffer: HostBuffer, after: Event | None = None) -> None:
        """Let others take a buffer; one that is not the ring's is forgotten.

        Args:
            after: must be passed before anything is written to it: a copy out of it that may still be under way.
        """
        with self._given:
            if buffer not in self._made:
                return
            if after is not None:
                self._after[id(buffer)] = after
            self._free.append(buffer)
            self._given.notify()

    def after(self, buffer: HostBuffer) -> Event | None:
        """What must be passed before anything is written to a buffer that was taken; asked once."""
        with self._given:
            return self._after.pop(id(buffer), None)

    def close(self) -> None:
        """Let go of all buffers. Nothing may be under way."""
        with self._given:
            while self._made:
                self._let_go(self._made[-1])
            self._free.clear()

    def _let_go(self, buffer: HostBuffer) -> None:
        self._made.remove(buffer)
        after = self._after.pop(id(buffer), None)
        if after is not None:
            after.synchronize()
        self._discard(buffer)
