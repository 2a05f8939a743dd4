"""Blocks on their way from disk into host memory of their own."""

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from offload.model.homes import ParameterHome
from offload.runtime.block_sources import packed_offsets
from offload.runtime.page_locked import PageLockedMemory
from offload.storage.codecs.weights import Source
from offload.storage.digest import digest
from offload.storage.errors import OffloadError
from offload.storage.host_buffer import HostBuffer
from offload.storage.ledger import MemoryLedger
from offload.storage.load_plan import LoadPlan
from offload.storage.reader import DiskReader
from offload.storage.transfer import Transfer


class BlockRead:
    """One block: where its bytes will be, and what brings them.

    Args:
        sources: what its tensors are made of; empty where they come from memory.
        offsets: of its tensors, in the buffer.
        start: begins to bring them, and calls what it is given when they are there; None where they are.
        digested: what the bytes of each tensor were when they came is in `digests`, from the moment on that they are there.
    """

    def __init__(
        self,
        buffer: HostBuffer,
        offsets: Sequence[int],
        sources: Sequence[Source] = (),
        start: Callable[[Callable[[], None]], Transfer] | None = None,
        digested: bool = False,
    ) -> None:
        self.buffer = buffer
        self.offsets = list(offsets)
        self.sources = list(sources)
        self.digests: list[bytes] = []
        self._digested = digested
        self._start = start
        self._transfer = None if start is None else start(self._arrived)

    def _arrived(self) -> None:
        """In a thread that reads, before anybody else sees the bytes."""
        if self._digested:
            places = zip(self.offsets, self.sources, strict=True)
            self.digests = [digest(self.buffer.tensor[offset : offset + item.nbytes]) for offset, item in places]

    def wait(self) -> "BlockRead":
        """Return when the bytes are there.

        Raises:
            ReadError: if the disk failed; the next one who waits has it tried again.
        """
        if self._start is not None:
            self._transfer = self._transfer or self._start(self._arrived)
            self._transfer.hasten()
            try:
                self._transfer.wait()
            except BaseException:
                if self._transfer.over:
                    self._transfer = None
                raise
            self._let_go()
        return self

    def cancel(self) -> None:
        """Nothing writes to the buffer any more."""
        if self._transfer is not None:
            self._transfer.cancel()
        self._let_go()

    def _let_go(self) -> None:
        """A transfer knows whom to call: the two would keep each other, and the buffer, until Python looks for cycles."""
        self._start = self._transfer = None


class BlockReads:
    """Starts them.

    Args:
        source_of: says which part of a file has a parameter's present values; None if only memory has.
    """

    def __init__(
        self, reader: DiskReader, memory: PageLockedMemory, source_of: Callable[[str, nn.Parameter], Source | None]
    ) -> None:
        self._reader, self._memory, self._source_of = reader, memory, source_of

    def start(self, homes: Sequence[ParameterHome], ledger: MemoryLedger, category: str, shielded: bool = False) -> BlockRead:
        """Bring one block's tensors, which somebody waits for, into a new host buffer.

        Args:
            ledger: charged for it, under `category`.
            shielded: as `HostBuffer` has it.
        """
        return self._of(homes, ledger, category, shielded=shielded)

    def start_in_background(self, homes: Sequence[ParameterHome], ledger: MemoryLedger, category: str) -> BlockRead:
        """The same for one that is not needed yet, with digests where it comes from disk."""
        return self._of(homes, ledger, category, background=True)

    def start_early(self, blocks: Iterable[Sequence[Source]], ledger: MemoryLedger, category: str) -> list[BlockRead]:
        """The same for blocks of which nothing is known but what they will be made of.

        All memory is mapped before anything is read: to map more waits for the page faults of threads that read.

        Raises:
            OffloadError: if they cannot all be read; nothing is charged, and nothing under way, then.
        """
        buffers: list[HostBuffer] = []
        reads: list[BlockRead] = []
        try:
            load_plans = [self._reader.plan(sources) for sources in blocks]
            for load_plan in load_plans:
                buffers.append(self._mapped(load_plan, ledger, category))
            for load_plan, buffer in zip(load_plans, buffers, strict=True):
                reads.append(self._begun(load_plan, buffer, background=True))
        except OffloadError:
            for read in reads:
                read.cancel()
            for buffer in buffers:
                ledger.release(category, buffer.nbytes)
            raise
        return reads

    def _of(
        self,
        homes: Sequence[ParameterHome],
        ledger: MemoryLedger,
        category: str,
        shielded: bool = False,
        background: bool = False,
    ) -> BlockRead:
        sources = [None if home.modified else self._source_of(home.name, home.parameter) for home in homes]
        on_disk = [item for item in sources if item is not None]
        if len(on_disk) == len(sources):
            return self._from_disk(on_disk, ledger, category, shielded, background)
        offsets, nbytes = packed_offsets(homes)
        buffer = self._memory.allocate(nbytes, category, ledger, shielded)
        for home, offset in zip(homes, offsets, strict=True):
            size = home.tensor.nbytes
            buffer.tensor[offset : offset + size].view(home.tensor.dtype).view(home.tensor.shape).copy_(home.tensor)
        read = BlockRead(buffer, offsets)
        if background:
            places = zip(offsets, homes, strict=True)
            read.digests = [digest(buffer.tensor[offset : offset + home.tensor.nbytes]) for offset, home in places]
        return read

    def _from_disk(
        self,
        sources: Sequence[Source],
        ledger: MemoryLedger,
        category: str,
        shielded: bool = False,
        background: bool = False,
    ) -> BlockRead:
        load_plan = self._reader.plan(sources)
        return self._begun(load_plan, self._mapped(load_plan, ledger, category, shielded), background)

    def _mapped(self, load_plan: LoadPlan, ledger: MemoryLedger, category: str, shielded: bool = False) -> HostBuffer:
        """Memory whose pages are made by the threads that read into it, while others read."""
        return self._memory.allocate(load_plan.slot_bytes, category, ledger, shielded, prefault=False)

    def _begun(self, load_plan: LoadPlan, buffer: HostBuffer, background: bool) -> BlockRead:
        memory = buffer.memory[: load_plan.slot_bytes]

        def start(then: Callable[[], None]) -> Transfer:
            return self._reader.read(load_plan, memory, then, background=background)

        return BlockRead(buffer, load_plan.offsets, load_plan.sources, start, digested=background)
