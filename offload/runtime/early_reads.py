"""Resident weights that are read while the model's code is imported still.

What an earlier session of the same request kept resident is remembered as ranges of files. The reads are a guess: a block
takes one over if it is made of just these ranges, and what nobody takes is dropped.
"""

import hashlib
import json
import os
from collections.abc import Container, Iterable, Sequence
from typing import Any

from offload.runtime.block_reads import BlockRead, BlockReads
from offload.runtime.machine import Machine
from offload.storage.blocks import FileRange
from offload.storage.cache_folder import cache_folder
from offload.storage.codecs.weights import Source
from offload.storage.errors import OffloadError
from offload.storage.ledger import MemoryLedger
from offload.storage.whole_file import keep_text

RESIDENT = "resident weights"
"""What the ledger calls them."""

_FOLDER = "resident"
_MOST_FILES = 64


class EarlyReads:
    """The reads of one session.

    Args:
        request: what stands for what was asked: equal for sessions that keep the same weights.
    """

    def __init__(self, request: Sequence[Any]) -> None:
        facts = json.dumps([str(item) for item in request])
        self._path = cache_folder() / _FOLDER / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.json"
        self._reads: dict[tuple[Source, ...], BlockRead] = {}
        self._ledger: MemoryLedger | None = None

    def begin(self, machine: Machine, budget_bytes: int) -> None:
        """Start to read what is remembered, if the files are those that they were and the plan fits that was run by."""
        try:
            kept = json.loads(self._path.read_text())
            files = {path: tuple(identity) for path, identity in kept["files"].items()}
            blocks = [[FileRange(path, offset, nbytes) for path, offset, nbytes in block] for block in kept["blocks"] if block]
            if kept["plan_bytes"] > budget_bytes or any(_identity(path) != known for path, known in files.items()):
                return
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return
        self._ledger = machine.ledger
        reads = BlockReads(machine.host.reader, machine.host.memory, lambda name, parameter: None)
        try:
            begun = reads.start_early(blocks, machine.ledger, RESIDENT)
            self._reads = {tuple(read.sources): read for read in begun}
        except OffloadError:
            return

    @property
    def resident_bytes(self) -> int:
        """Memory that holds what has come so far."""
        return sum(read.buffer.resident_bytes for read in self._reads.values())

    def take(self, sources: Sequence[Source | None]) -> BlockRead | None:
        """The read of a block that is made of these; None if it was not begun."""
        return self._reads.pop(tuple(sources), None)  # type: ignore[arg-type]

    def drop(self, but: Container[tuple[Source | None, ...]] = ()) -> None:
        """Give back what nobody took; before a plan is placed, which may be another one than last time.

        Args:
            but: the sources of blocks that will be asked for.
        """
        for sources in [sources for sources in self._reads if sources not in but]:
            read = self._reads.pop(sources)
            read.cancel()
            assert self._ledger is not None
            self._ledger.release(RESIDENT, read.buffer.nbytes)

    def remember(self, blocks: Iterable[Sequence[FileRange]], plan_bytes: int) -> None:
        """Keep for the next session what this one keeps resident.

        Args:
            plan_bytes: what its plan takes of the budget.
        """
        try:
            files = {path: _identity(path) for path in {item.path for ranges in blocks for item in ranges}}
        except OSError:
            return
        content = {
            "plan_bytes": plan_bytes,
            "files": files,
            "blocks": [[[item.path, item.offset, item.nbytes] for item in ranges] for ranges in blocks],
        }
        keep_text(self._path, json.dumps(content), _MOST_FILES)


def _identity(path: str) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_size, status.st_ino, status.st_mtime_ns
