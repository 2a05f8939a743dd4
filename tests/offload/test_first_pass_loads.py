"""Entering starts to read the resident weights; the first pass waits for each when it comes to it."""

import errno
import os
import threading

import pytest
import torch

from offload import ReadError, offload
from tests.architectures import make, tokens
from tests.budgets import ALL, SOME, budget_for, spec_of
from tests.offload.test_edits import EDITS, WEIGHTS, edited

RESERVE = {"batch_size": 2, "max_tokens": 40}
_READ = os.preadv


class HeldDisk:
    """Reads by the link's threads wait until it is let go; the n-th one after that fails, if so asked."""

    def __init__(self, monkeypatch):
        self.go, self.failing, self.reads = threading.Event(), 0, 0
        monkeypatch.setattr(os, "preadv", self._preadv)

    def _preadv(self, *args):
        if not threading.current_thread().name.startswith("offload-disk"):
            return _READ(*args)
        # Not for ever, so that a test that fails ends.
        self.go.wait(10)
        self.reads += 1
        if self.reads == self.failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return _READ(*args)


@pytest.fixture
def disk(monkeypatch):
    held = HeldDisk(monkeypatch)
    yield held
    held.go.set()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint, and what the planner is told of it."""
    path = tmp_path_factory.mktemp("model")
    make("llama").save_pretrained(path)
    return str(path), spec_of(str(path), **RESERVE)


def entered(saved, residency, **options):
    folder, spec = saved
    return offload(folder, device="cpu", cpu_memory=budget_for(spec, residency, 2, 40), **RESERVE, **options)


@torch.no_grad()
def logits(model):
    return model(tokens()).logits


@pytest.mark.parametrize("residency", [SOME, ALL])
def test_entering_does_not_wait_for_weights_and_the_first_pass_does(residency, saved, disk):
    with entered(saved, residency) as session:
        assert disk.reads == 0
        assert session.plan.weights.resident
        threading.Timer(0.2, disk.go.set).start()
        assert torch.equal(logits(session.model), logits(make("llama")))
        loaded = session.machine.clock.loading_seconds
        assert loaded > 0
        assert torch.equal(logits(session.model), logits(make("llama")))
        assert session.machine.clock.loading_seconds == loaded


def test_a_failed_read_ends_the_pass_and_the_next_one_succeeds(saved, disk):
    disk.failing = 1
    with entered(saved, ALL) as session:
        disk.go.set()
        with pytest.raises(ReadError):
            logits(session.model)
        assert torch.equal(logits(session.model), logits(make("llama")))


@pytest.mark.parametrize("edit", list(EDITS))
@pytest.mark.parametrize("residency", [SOME, ALL])
def test_an_edit_before_anything_arrived_counts(edit, residency, saved, disk):
    twin = make("llama")
    with entered(saved, residency) as session:
        for model in (twin, session.model):
            edited(model, EDITS[edit], WEIGHTS)
        disk.go.set()
        assert torch.equal(logits(session.model), logits(twin))
        assert torch.equal(logits(session.model), logits(twin))
        for model in (twin, session.model):
            edited(model, EDITS[edit], WEIGHTS)
        assert torch.equal(logits(session.model), logits(twin))
        model = session.model
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_leaving_before_anything_arrived_leaves_the_model_as_it_was(saved, disk):
    with entered(saved, ALL) as session:
        model = session.model
        threading.Timer(0.1, disk.go.set).start()
    assert torch.equal(logits(model), logits(make("llama")))


def test_weights_are_told_right_before_they_arrive(saved, disk):
    with entered(saved, ALL) as session:
        for name, value in make("llama").state_dict().items():
            assert torch.equal(session.model.state_dict()[name], value), name
        assert disk.reads == 0
        disk.go.set()


def test_progress_of_loading_is_told_in_the_first_pass(saved, disk):
    told = []
    with entered(saved, ALL, progress=lambda *step: told.append(step)) as session:
        assert not told
        disk.go.set()
        logits(session.model)
        resident = sum(block.nbytes for block in session._parts.residency.placement.resident.values())
    assert {what for what, _, _ in told} == {"loading"}
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})
    assert told[-1][1:] == (resident, resident)
