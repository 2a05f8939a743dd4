"""Blocks that are read in turn: the next ones under way, and nothing charged for that did not arrive."""

from types import SimpleNamespace

import pytest

from offload.runtime.block_reads import BlockReads
from offload.storage.blocks import Tier
from offload.storage.errors import ReadError
from offload.storage.ledger import MemoryLedger


class Reads(BlockReads):
    """Block number `broken` fails."""

    def __init__(self, broken=None):
        self.broken, self.events = broken, []

    def start(self, homes, ledger, category, shielded=False):
        (number,) = homes
        ledger.charge(category, 100)
        self.events.append(("start", number))
        return SimpleNamespace(
            buffer=SimpleNamespace(nbytes=100),
            wait=lambda: self.wait(number),
            cancel=lambda: self.events.append(("cancel", number)),
        )

    def wait(self, number):
        if number == self.broken:
            raise ReadError("broken")
        self.events.append(("wait", number))


def test_two_are_under_way_while_one_is_waited_for():
    reads, ledger = Reads(), MemoryLedger(Tier.CPU, 1000)
    assert len(list(reads.in_turn([[number] for number in range(4)], ledger, "weights"))) == 4
    assert reads.events[:4] == [("start", 0), ("start", 1), ("start", 2), ("wait", 0)]
    assert [number for event, number in reads.events if event == "wait"] == [0, 1, 2, 3]
    assert ledger.held_bytes("weights") == 400


def test_what_did_not_arrive_is_cancelled_and_not_charged():
    reads, ledger = Reads(broken=1), MemoryLedger(Tier.CPU, 1000)
    arrived = []
    with pytest.raises(ReadError):
        for read in reads.in_turn([[number] for number in range(5)], ledger, "weights"):
            arrived.append(read)
    assert len(arrived) == 1
    assert [number for event, number in reads.events if event == "cancel"] == [1, 2, 3]
    assert ledger.held_bytes("weights") == 100
