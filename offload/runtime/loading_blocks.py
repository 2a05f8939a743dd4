"""Resident blocks that are still being read: the first pass waits for each when it comes to it."""

import time
from collections.abc import Callable, Iterable

from offload.runtime.weights import ResidentBlock
from offload.storage.blocks import BlockKey, FileRange


class LoadingBlocks:
    """The resident blocks of one session, until the last has arrived.

    Args:
        progress: told (done bytes, total bytes) as they arrive.
    """

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self.on_arrival: Callable[[ResidentBlock], None] = lambda block: None
        self._progress = progress
        self._awaited: dict[BlockKey, ResidentBlock] = {}
        self._done = self._total = 0

    def __bool__(self) -> bool:
        return bool(self._awaited)

    @property
    def ranges(self) -> list[list[FileRange]]:
        """Where those lie that come from files as they are, block by block."""
        found = []
        for block in self._awaited.values():
            ranges = [item for item in block.sources if isinstance(item, FileRange) and item.crc32 is None]
            if ranges and len(ranges) == len(block.sources):
                found.append(ranges)
        return found

    def add(self, block: ResidentBlock) -> None:
        """A block is on its way."""
        self._awaited[block.key] = block
        self._total += block.nbytes

    def arrive(self, keys: Iterable[BlockKey]) -> float:
        """These blocks are needed: return when they are there, with the seconds that this took.

        Raises:
            ReadError: if the disk failed; they are tried again the next time.
        """
        wanted = [self._awaited[key] for key in keys if key in self._awaited]
        if not wanted:
            return 0.0
        begun = time.perf_counter()
        for block in wanted:
            block.arrive()
            self.on_arrival(block)
            del self._awaited[block.key]
            self._done += block.nbytes
            self._progress(self._done, self._total)
        return time.perf_counter() - begun

    def finish(self) -> float:
        """All of them are needed: as `arrive`."""
        return self.arrive(list(self._awaited))

    def stop(self) -> None:
        """None of them is needed any more."""
        for block in self._awaited.values():
            block.stop()
        self._awaited.clear()
