"""What layers were given, on its way to NVMe and back, whatever ends late."""

import gc
import threading

import pytest
import torch

from offload import SessionError
from offload.storage.devices.cpu import CpuDevice
from offload.storage.state_file import StateFile
from offload.storage.transfer import Link
from offload.training.backward.activation_offload import CpuActivations
from offload.training.backward.nvme_activations import INPUT_BUFFERS, NvmeActivations
from tests.delayed import DelayedDevice


@pytest.fixture
def links():
    reads, writes = Link("disk", 2), Link("disk writes", 2)
    yield reads, writes
    reads.close()
    writes.close()


@pytest.fixture
def store(links, tmp_path):
    found = NvmeActivations(CpuDevice(), str(tmp_path), *links, lambda nbytes: None)
    yield found
    found.close()


def gated(monkeypatch, name):
    """Calls of a StateFile's method each wait for an event of its own, in the order of their beginning."""
    run, gates, lock = getattr(StateFile, name), [], threading.Lock()

    def late(self, place, memory):
        gate = threading.Event()
        with lock:
            gates.append(gate)
        assert gate.wait(30)
        run(self, place, memory)

    monkeypatch.setattr(StateFile, name, late)
    return gates


def wait_until(condition):
    for _ in range(3000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came")


def test_a_place_is_not_used_again_while_its_last_write_is_under_way(store, monkeypatch):
    gates = gated(monkeypatch, "write")
    first = torch.ones(1024)
    kept = store.keep(first)
    wait_until(lambda: len(gates) == 1)
    # It was handed back from where it was on its way out, and nobody wants it any more.
    del kept, first
    second = torch.full((1024,), 2.0)
    kept = store.keep(second)
    wait_until(lambda: len(gates) == 2)
    del second
    gates[1].set()
    kept._written.wait()
    gates[0].set()
    store._writes.wait_idle()
    assert torch.equal(kept.tensor(), torch.full((1024,), 2.0))


def test_places_are_used_again(store):
    for number in range(50):
        value = torch.full((1024,), float(number))
        kept = store.keep(value)
        del value
        kept._written.wait()
        assert kept.tensor()[0] == number
    assert store._end <= 2 * 4096


def test_a_buffer_is_not_used_again_while_it_is_read_into(store, monkeypatch):
    kept = [store.keep(torch.full((1024,), float(number))) for number in range(2)]
    store._writes.wait_idle()
    gates = gated(monkeypatch, "read")
    kept[0].prefetch()
    wait_until(lambda: len(gates) == 1)
    kept[0] = None  # a read that nobody wants any more
    taken = [store.keep(torch.full((1024,), float(number))) for number in range(10, 14)]
    monkeypatch.undo()
    gates[0].set()
    store._reads.wait_idle()
    assert [int(item.tensor()[0]) for item in taken] == [10, 11, 12, 13]
    assert int(kept[1].tensor()[0]) == 1


def test_all_buffers_are_in_use_for_what_was_fetched_ahead(store):
    kept = [store.keep(torch.full((1024,), float(number))) for number in range(INPUT_BUFFERS + 2)]
    store._writes.wait_idle()
    for item in kept:
        item.prefetch()
    further = store.keep(torch.full((4096,), 99.0))
    assert [int(item.tensor()[0]) for item in (*kept, further)] == [*range(INPUT_BUFFERS + 2), 99]
    larger = store.keep(torch.full((8192,), 7.0))
    store._writes.wait_idle()
    assert int(larger.tensor()[0]) == 7


def test_forgetting_one_waits_for_nothing(store, monkeypatch):
    """The garbage collector may do it in a thread that holds the link's lock."""
    kept = store.keep(torch.ones(1024))
    store._writes.wait_idle()
    gates = gated(monkeypatch, "read")
    kept.prefetch()
    wait_until(lambda: len(gates) == 1)
    with store._reads._lock, store._lock:
        del kept
        gc.collect()
    gates[0].set()


@pytest.mark.parametrize("kind", ["cpu", "nvme"])
def test_what_was_written_to_is_not_handed_back(kind, store):
    chosen = store if kind == "nvme" else CpuActivations(DelayedDevice(), lambda nbytes: None)
    value = torch.ones(1024)
    kept = chosen.keep(value)
    value.add_(1)
    with pytest.raises(SessionError, match="written to"):
        chosen.keep(value)
    with pytest.raises(SessionError, match="written to"):
        kept.tensor()
    chosen.close()
