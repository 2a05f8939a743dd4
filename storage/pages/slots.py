"""Places for pages in the memory of one tier."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from offload.storage.devices.base import Event

_CHUNK_BYTES = 32 << 20


class Buffer(Protocol):
    """Memory as bytes; on the host, also as a memoryview."""

    tensor: torch.Tensor


class PageSlots:
    """Slots of one size with a free list on the host; their memory is taken in chunks, when it is first needed.

    Args:
        allocate: memory of so many bytes.
        page_bytes: of one slot.
        limit: the most slots there may be.
    """

    def __init__(self, allocate: Callable[[int], Buffer], page_bytes: int, limit: int) -> None:
        self.page_bytes = page_bytes
        self.limit = limit
        self._allocate = allocate
        self._chunk_pages = max(1, _CHUNK_BYTES // page_bytes)
        self._buffers: list[Buffer] = []
        self._made = 0
        self._free: deque[int] = deque()
        self._after: dict[int, Event] = {}
        self._given = threading.Condition()

    @property
    def free(self) -> int:
        """Slots that can be taken now."""
        with self._given:
            return len(self._free) + self.limit - self._made

    @property
    def held_bytes(self) -> int:
        """Memory that was taken so far."""
        return self._made * self.page_bytes

    def take(self) -> int | None:
        """A slot; None if all are in use."""
        with self._given:
            if not self._free and self._made < self.limit:
                count = min(self._chunk_pages, self.limit - self._made)
                self._buffers.append(self._allocate(count * self.page_bytes))
                self._free.extend(range(self._made, self._made + count))
                self._made += count
            return self._free.popleft() if self._free else None

    def wait_take(self) -> int:
        """A slot, as soon as another thread gives one back."""
        while (slot := self.take()) is None:
            with self._given:
                self._given.wait_for(lambda: bool(self._free), timeout=1.0)
        return slot

    def give(self, slot: int, after: Event | None = None) -> None:
        """Args: after: must be passed before anything is written there."""
        with self._given:
            if after is not None:
                self._after[slot] = after
            self._free.append(slot)
            self._given.notify()

    def after(self, slot: int) -> Event | None:
        """What must be passed before anything is written to a slot that was taken; asked once."""
        with self._given:
            return self._after.pop(slot, None)

    def tensor(self, slot: int) -> torch.Tensor:
        """uint8 [page_bytes]."""
        return self.span(slot, 1)

    def follows(self, slot: int, before: int) -> bool:
        """True if `slot` lies right behind `before`, in the same memory."""
        return slot == before + 1 and bool(slot % self._chunk_pages)

    def span(self, slot: int, count: int) -> torch.Tensor:
        """uint8 [count * page_bytes] of slots of which each follows the one before."""
        start = slot % self._chunk_pages * self.page_bytes
        return self._buffers[slot // self._chunk_pages].tensor[start : start + count * self.page_bytes]

    def memory(self, slot: int) -> memoryview:
        """The same for the disk; on the host only."""
        start = slot % self._chunk_pages * self.page_bytes
        memory: memoryview = self._buffers[slot // self._chunk_pages].memory  # type: ignore[attr-defined]
        return memory[start : start + self.page_bytes]

    def close(self) -> list[Buffer]:
        """Forget the memory; what it was."""
        buffers, self._buffers = self._buffers, []
        self._made = self.limit = 0
        self._free.clear()
        self._after.clear()
        return buffers
