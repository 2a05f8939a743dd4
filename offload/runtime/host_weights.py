"""Blocks that live in host memory, and what brings them to the device from there."""

from collections.abc import Callable, Sequence

from torch import nn

from offload.model.homes import ParameterHome
from offload.runtime.block_reads import BlockReads
from offload.runtime.block_sources import EncodedSource, HostSource
from offload.runtime.page_locked import PageLockedMemory
from offload.storage.blocks import BlockKey
from offload.storage.codecs.weights import EncodedTensor, Source
from offload.storage.host_buffer import HostBuffer
from offload.storage.ledger import MemoryLedger
from offload.storage.reader import DiskReader

STREAMED = "streamed weights"


class HostWeights:
    """The blocks of one session that live there.

    Args:
        reads: brings plain blocks.
        ledger: of host memory.
        source_of: says which part of a file has a parameter's present values; None if only memory does.
    """

    def __init__(
        self,
        reader: DiskReader,
        reads: BlockReads,
        memory: PageLockedMemory,
        ledger: MemoryLedger,
        source_of: Callable[[str, nn.Parameter], Source | None],
    ) -> None:
        self._reader, self._reads, self._memory, self._ledger = reader, reads, memory, ledger
        self._source_of = source_of

    def settle(self, homes: Sequence[ParameterHome], category: str, locked: bool = True) -> tuple[HostBuffer, list[int]]:
        """Make one new host buffer the home of a block's parameters.

        Args:
            locked: page-lock it, to copy from.

        Returns:
            The buffer, and where each tensor lies in it.
        """
        read = self._reads.start(homes, self._ledger, category, shielded=True).wait()
        buffer, offsets = read.buffer, read.offsets
        for home, offset in zip(homes, offsets, strict=True):
            view = buffer.own_storage(offset, home.tensor.nbytes).view(home.tensor.dtype).view(home.tensor.shape)
            if self._source_of(home.name, home.parameter) is None:
                home.original = None
            home.tensor, home.shield = view, buffer
            home.parameter.data = view
        self._memory.keep(buffer, locked)
        return buffer, offsets

    def source(self, key: BlockKey, homes: Sequence[ParameterHome], category: str) -> HostSource | EncodedSource:
        """What streams a block from there: it is put there in its stored form, if that is encoded."""
        sources = [None if home.modified else self._source_of(home.name, home.parameter) for home in homes]
        whole = [item for item in sources if item is not None]
        if len(whole) == len(sources) and any(isinstance(item, EncodedTensor) for item in whole):
            return self._encoded(key, whole, category)
        return HostSource(key, self._memory, *self.settle(homes, category))

    def _encoded(self, key: BlockKey, sources: Sequence[Source], category: str) -> EncodedSource:
        load_plan = self._reader.plan(sources)
        stored = load_plan.stored
        buffer = self._memory.allocate(stored.slot_bytes, category, self._ledger, prefault=False)
        shares = self._memory.shares_host_memory
        if not shares:
            self._reader.read(stored, buffer.memory[: stored.slot_bytes], name=key).wait()
        self._memory.keep(buffer, locked=not shares)
        return EncodedSource(key, self._memory, buffer, self._reader, load_plan)

    def release(self, source: EncodedSource, category: str) -> None:
        """Let go of a block's stored form. Nothing may be under way."""
        self._memory.forget(source.buffer)
        self._ledger.release(category, source.buffer.nbytes)
