"""Blocks on their way from disk into host memory of their own."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from offload.model.homes import ParameterHome
from offload.runtime.block_sources import packed_offsets
from offload.runtime.page_locked import PageLockedMemory
from offload.storage.blocks import FileRange
from offload.storage.host_buffer import HostBuffer
from offload.storage.ledger import MemoryLedger
from offload.storage.reader import DiskReader
from offload.storage.transfer import Transfer

_AHEAD = 2
"""Blocks that are read while one is waited for."""


@dataclass(frozen=True, slots=True)
class BlockRead:
    """One block: where its bytes will be, and what brings them.

    Attributes:
        offsets: of its tensors, in the buffer.
    """

    buffer: HostBuffer
    offsets: list[int]
    _transfer: Transfer | None

    def wait(self) -> "BlockRead":
        """Return when the bytes are there.

        Raises:
            ReadError: if the disk failed.
        """
        if self._transfer is not None:
            self._transfer.wait()
        return self

    def cancel(self) -> None:
        """Nothing writes to the buffer any more."""
        if self._transfer is not None:
            self._transfer.cancel()


class BlockReads:
    """Starts them.

    Args:
        source_of: says which part of a file has a parameter's present values; None if only memory has.
    """

    def __init__(
        self, reader: DiskReader, memory: PageLockedMemory, source_of: Callable[[str, nn.Parameter], FileRange | None]
    ) -> None:
        self._reader, self._memory, self._source_of = reader, memory, source_of

    def start(self, homes: Sequence[ParameterHome], ledger: MemoryLedger, category: str, shielded: bool = False) -> BlockRead:
        """Bring one block's tensors into a new host buffer.

        Args:
            ledger: charged for it, under `category`.
            shielded: as `HostBuffer` has it.
        """
        ranges = [None if home.modified else self._source_of(home.name, home.parameter) for home in homes]
        on_disk = [item for item in ranges if item is not None]
        if len(on_disk) == len(ranges):
            read_plan = self._reader.plan(on_disk)
            # The pages are made by the threads that read into them, while others read.
            buffer = self._memory.allocate(read_plan.slot_bytes, category, ledger, shielded, prefault=False)
            transfer = self._reader.read(on_disk, read_plan, buffer.memory[: read_plan.slot_bytes])
            return BlockRead(buffer, list(read_plan.offsets), transfer)
        offsets, nbytes = packed_offsets(homes)
        buffer = self._memory.allocate(nbytes, category, ledger, shielded)
        for home, offset in zip(homes, offsets, strict=True):
            size = home.tensor.nbytes
            buffer.tensor[offset : offset + size].view(home.tensor.dtype).view(home.tensor.shape).copy_(home.tensor)
        return BlockRead(buffer, offsets, None)

    def in_turn(self, blocks: Sequence[Sequence[ParameterHome]], ledger: MemoryLedger, category: str) -> Iterator[BlockRead]:
        """The blocks' reads, each when it is over; the next ones are under way meanwhile.

        Raises:
            ReadError: if the disk failed; what did not arrive is no longer charged for.
        """
        ahead: deque[BlockRead] = deque()
        try:
            for homes in blocks:
                ahead.append(self.start(homes, ledger, category))
                if len(ahead) > _AHEAD:
                    ahead[0].wait()
                    yield ahead.popleft()
            while ahead:
                ahead[0].wait()
                yield ahead.popleft()
        finally:
            for read in ahead:
                read.cancel()
                ledger.release(category, read.buffer.nbytes)
