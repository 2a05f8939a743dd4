"""The budget is hard."""

import pytest

from offload.storage.blocks import Tier
from offload.storage.errors import BudgetExceeded
from offload.storage.ledger import MemoryLedger


def test_refuses_what_would_pass_the_budget_and_counts_nothing_then():
    ledger = MemoryLedger(Tier.CPU, 100)
    ledger.charge("slots", 60)
    with pytest.raises(BudgetExceeded, match=r"KV cache needs 41 B more.*budget is 100 B.*60 B is held.*slots 60 B"):
        ledger.charge("KV cache", 41)
    assert ledger.used_bytes == 60
    ledger.charge("KV cache", 40)
    assert ledger.free_bytes == 0


def test_remembers_what_was_held_at_the_peak():
    ledger = MemoryLedger(Tier.DEVICE, None)
    ledger.charge("a", 5)
    ledger.charge("b", 7)
    ledger.release("a", 5)
    ledger.set("b", 9)
    assert (ledger.peak_bytes, ledger.by_category_at_peak()) == (12, {"a": 5, "b": 7})
    assert ledger.used_bytes == 9


def test_giving_back_more_than_is_held_is_a_bug():
    ledger = MemoryLedger(Tier.CPU, 100)
    ledger.charge("a", 5)
    with pytest.raises(AssertionError, match="gives back"):
        ledger.release("a", 6)
