"""Blocks on their way from disk into host memory of their own."""

from collections.abc import Callable, Sequence

from torch import nn

from offload.model.homes import ParameterHome
from offload.runtime.block_sources import packed_offsets
from offload.runtime.page_locked import PageLockedMemory
from offload.storage.blocks import FileRange
from offload.storage.host_buffer import HostBuffer
from offload.storage.ledger import MemoryLedger
from offload.storage.reader import DiskReader
from offload.storage.transfer import Transfer

OnArrival = Callable[[HostBuffer, Sequence[int]], None]
"""Called in a thread that reads, with a block's memory and the offsets of its tensors, before anybody else sees them."""


class BlockRead:
    """One block: where its bytes will be, and what brings them.

    Args:
        offsets: of its tensors, in the buffer.
        start: begins to bring them; None where they are there.
    """

    def __init__(self, buffer: HostBuffer, offsets: Sequence[int], start: Callable[[], Transfer] | None = None) -> None:
        self.buffer = buffer
        self.offsets = list(offsets)
        self._start = start
        self._transfer = None if start is None else start()

    def wait(self) -> "BlockRead":
        """Return when the bytes are there.

        Raises:
            ReadError: if the disk failed; the next one who waits has it tried again.
        """
        if self._start is not None:
            self._transfer = self._transfer or self._start()
            self._transfer.hasten()
            try:
                self._transfer.wait()
            except BaseException:
                if self._transfer.over:
                    self._transfer = None
                raise
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
        """Bring one block's tensors, which somebody waits for, into a new host buffer.

        Args:
            ledger: charged for it, under `category`.
            shielded: as `HostBuffer` has it.
        """
        return self._of(homes, ledger, category, shielded)

    def start_in_background(
        self, homes: Sequence[ParameterHome], ledger: MemoryLedger, category: str, then: OnArrival
    ) -> BlockRead:
        """The same for one that is not needed yet."""
        return self._of(homes, ledger, category, False, then)

    def _of(
        self,
        homes: Sequence[ParameterHome],
        ledger: MemoryLedger,
        category: str,
        shielded: bool,
        then: OnArrival | None = None,
    ) -> BlockRead:
        ranges = [None if home.modified else self._source_of(home.name, home.parameter) for home in homes]
        on_disk = [item for item in ranges if item is not None]
        if len(on_disk) < len(ranges):
            return self._copied(homes, ledger, category, shielded, then)
        read_plan = self._reader.plan(on_disk)
        # The pages are made by the threads that read into them, while others read.
        buffer = self._memory.allocate(read_plan.slot_bytes, category, ledger, shielded, prefault=False)
        memory, offsets = buffer.memory[: read_plan.slot_bytes], list(read_plan.offsets)
        finish = None if then is None else lambda: then(buffer, offsets)
        return BlockRead(
            buffer, offsets, lambda: self._reader.read(on_disk, read_plan, memory, finish, background=then is not None)
        )

    def _copied(
        self,
        homes: Sequence[ParameterHome],
        ledger: MemoryLedger,
        category: str,
        shielded: bool,
        then: OnArrival | None,
    ) -> BlockRead:
        offsets, nbytes = packed_offsets(homes)
        buffer = self._memory.allocate(nbytes, category, ledger, shielded)
        for home, offset in zip(homes, offsets, strict=True):
            size = home.tensor.nbytes
            buffer.tensor[offset : offset + size].view(home.tensor.dtype).view(home.tensor.shape).copy_(home.tensor)
        if then is not None:
            then(buffer, offsets)
        return BlockRead(buffer, offsets)
