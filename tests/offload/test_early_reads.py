"""What an earlier session kept resident is read while the model's code is imported: a guess, which can only be in vain."""

import json
import os

import pytest
import torch

from offload import offload
from offload.runtime.early_reads import RESIDENT, EarlyReads
from offload.runtime.page_locked import PageLockedMemory
from offload.storage.cache_folder import cache_folder
from offload.storage.errors import BudgetExceeded
from tests.architectures import make, tokens
from tests.budgets import ALL, SOME, budget_for, spec_of

RESERVE = {"batch_size": 2, "max_tokens": 40}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A checkpoint, and what the planner is told of it; nothing is remembered yet."""
    folder = str(tmp_path / "model")
    make("llama").save_pretrained(folder)
    spec = spec_of(folder, **RESERVE)
    monkeypatch.setenv("OFFLOAD_PROFILES", str(tmp_path / "cache"))
    return folder, spec


@pytest.fixture
def taken(monkeypatch):
    """Whether each block that was wanted had been begun early."""
    found = []
    take = EarlyReads.take

    def noted(self, ranges):
        read = take(self, ranges)
        found.append(read is not None)
        return read

    monkeypatch.setattr(EarlyReads, "take", noted)
    return found


def entered(saved, residency=SOME, **options):
    folder, spec = saved
    return offload(folder, device="cpu", cpu_memory=budget_for(spec, residency, 2, 40), **RESERVE, **options)


@torch.no_grad()
def assert_right(session):
    assert torch.equal(session.model(tokens()).logits, make("llama")(tokens()).logits)
    resident = session._parts.residency.placement.resident.values()
    assert session.machine.ledger.held_bytes(RESIDENT) == sum(block.nbytes for block in resident) + outside(session)


def outside(session):
    return sum(home.tensor.nbytes for home in session._parts.residency.placement.outside)


def remembered():
    (path,) = (cache_folder() / "resident").glob("*.json")
    return path


def test_the_second_session_has_begun_all_blocks_early(saved, taken):
    with entered(saved) as session:
        assert_right(session)
        blocks = len(session.plan.weights.resident)
    assert taken == [False] * blocks
    with entered(saved) as session:
        assert_right(session)
    assert taken == [False] * blocks + [True] * blocks


def test_it_may_be_entered_and_left_without_a_pass(saved, taken):
    for _ in range(2):
        with entered(saved) as session:
            model = session.model
    assert taken[-1]
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, make("llama")(tokens()).logits)


@pytest.mark.parametrize("other", ["other files", "a smaller budget", "a broken file", "another budget"])
def test_nothing_is_begun_for_what_is_no_longer_so(other, saved, taken):
    with entered(saved) as session:
        assert_right(session)
    taken.clear()
    residency = SOME
    if other == "other files":
        os.utime(f"{saved[0]}/model.safetensors")
    if other == "a smaller budget":
        content = json.loads(remembered().read_text())
        remembered().write_text(json.dumps({**content, "plan_bytes": 1 << 40}))
    if other == "a broken file":
        remembered().write_text("[1, 2")
    if other == "another budget":
        residency = ALL
    with entered(saved, residency) as session:
        assert_right(session)
    assert taken
    assert not any(taken)


@pytest.mark.parametrize(
    "blocks", [lambda blocks: [block[1:] for block in blocks], lambda blocks: [[item for block in blocks for item in block]]]
)
def test_what_no_block_wants_is_dropped(blocks, saved, taken):
    """The plan became another one; what was begun for the old one leaves the budget before anything else is charged for."""
    with entered(saved, ALL) as session:
        assert_right(session)
    taken.clear()
    content = json.loads(remembered().read_text())
    remembered().write_text(json.dumps({**content, "blocks": blocks(content["blocks"])}))
    with entered(saved, ALL) as session:
        assert_right(session)
    assert not any(taken)


def test_where_not_all_can_be_read_none_is_begun(saved, taken, monkeypatch):
    """The last of them finds no room; what the others were charged with is given back, and the session reads as ever."""
    with entered(saved, ALL) as session:
        blocks = len(session.plan.weights.resident)
    taken.clear()
    allocate, asked = PageLockedMemory.allocate, []

    def refusing(self, *args, **options):
        asked.append(args)
        if len(asked) == blocks:
            raise BudgetExceeded("no room for the last one")
        return allocate(self, *args, **options)

    monkeypatch.setattr(PageLockedMemory, "allocate", refusing)
    with entered(saved, ALL) as session:
        assert_right(session)
    assert len(asked) > blocks
    assert not any(taken)


def test_the_cache_folder_may_be_missing_and_unwritable(saved, taken, monkeypatch):
    monkeypatch.setenv("OFFLOAD_PROFILES", "/proc/none")
    for _ in range(2):
        with entered(saved) as session:
            assert_right(session)
    assert not any(taken)
