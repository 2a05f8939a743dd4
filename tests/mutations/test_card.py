"""Faults of order and place on a card. Each is planted ten times, and caught ten times."""

import pytest
import torch

from offload import Training, offload
from offload.runtime.executor import LayerExecutor
from offload.runtime.row_upload import RowUpload
from offload.storage.devices.cuda import CudaDevice
from offload.storage.pages.pool import PageFetch
from tests.architectures import make, oracle_of, tokens
from tests.budgets import NONE, budget_for, spec_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

TIMES = 10
BATCH, MAX_TOKENS = 2, 24


def streamed(plain, **options):
    spec = spec_of(plain, batch_size=BATCH, max_tokens=MAX_TOKENS)
    budget = budget_for(spec, NONE, BATCH, MAX_TOKENS, "cuda") + 65_536
    reserve = {"batch_size": BATCH, "max_tokens": MAX_TOKENS}
    return offload(plain, device="cuda", gpu_memory=budget, cpu_memory="1GiB", **reserve, **options)


def generated():
    plain = make("llama")
    with streamed(plain) as session, torch.inference_mode():
        assert session.plan.weights.streamed
        return session.model.generate(tokens(BATCH, 7).cuda(), max_new_tokens=4, do_sample=False).cpu()


def paged():
    plain = make("llama")
    options = {"gpu_memory": "64MiB", "cpu_memory": "1GiB", "kv_memory": 24 << 10, "batch_size": 1, "max_tokens": 96}
    with offload(plain, device="cuda", **options) as session, torch.inference_mode():
        found = session.model.generate(tokens(1, 60).cuda(), max_new_tokens=4, min_new_tokens=4, do_sample=False).cpu()
        assert session._kv.paged.onloaded_bytes
        return found


def trained():
    plain = make("llama")
    ids = tokens(BATCH, 7).cuda()
    with offload(plain, device="cuda", gpu_memory="64MiB", cpu_memory="1GiB", training=Training(full=True)) as session:
        session.backward([lambda: session.model(input_ids=ids, labels=ids, use_cache=False).loss] * 2)
        return torch.cat([value.grad.reshape(-1).cpu() for value in session.model.parameters() if value.grad is not None])


def caught(run, planted, monkeypatch, message):
    """Nothing is raised without the fault; with it, the card refuses each time."""
    run()
    planted(monkeypatch)
    for _ in range(TIMES):
        with pytest.raises(RuntimeError, match=message):
            run()


def no_wait_before_a_slot_is_overwritten(monkeypatch):
    real = CudaDevice.copy_in
    monkeypatch.setattr(CudaDevice, "copy_in", lambda self, copies, after=(), name="": real(self, copies, (), name))


def no_wait_after_an_allocation(monkeypatch):
    from offload.storage.devices.cuda import CudaBuffer

    def allocate(self, nbytes):
        with torch.inference_mode(False):
            return CudaBuffer(torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device), nbytes)

    monkeypatch.setattr(CudaDevice, "allocate", allocate)


def weights_are_bound_before_they_arrived(monkeypatch):
    monkeypatch.setattr(CudaDevice, "wait", lambda self, event: None)


def a_page_is_read_before_it_arrived(monkeypatch):
    monkeypatch.setattr(PageFetch, "wait", lambda self: self._pool.slots.tensor(self.slot))


def a_slot_is_freed_while_a_kernel_reads_it(monkeypatch):
    monkeypatch.setattr(PageFetch, "release", lambda self, after=None: self._end(None))


def slots_are_handed_on_while_a_kernel_reads_them(monkeypatch):
    monkeypatch.setattr(LayerExecutor, "_after", lambda self, lease: None)


def rows_stay_in_cpu_memory(monkeypatch):
    def run(self, shape, dtype, fill):
        rows = torch.empty(shape, dtype=dtype)
        fill(rows)
        return rows

    monkeypatch.setattr(RowUpload, "run", run)


UNORDERED = "unordered access"
FAULTS = {
    no_wait_before_a_slot_is_overwritten: (generated, UNORDERED),
    no_wait_after_an_allocation: (generated, UNORDERED),
    weights_are_bound_before_they_arrived: (generated, UNORDERED),
    slots_are_handed_on_while_a_kernel_reads_them: (generated, UNORDERED),
    a_page_is_read_before_it_arrived: (paged, UNORDERED),
    a_slot_is_freed_while_a_kernel_reads_it: (paged, UNORDERED),
    rows_stay_in_cpu_memory: (generated, "same device"),
}


@pytest.mark.parametrize("planted", list(FAULTS), ids=lambda planted: planted.__name__)
def test_the_card_refuses(planted, card, monkeypatch):
    run, message = FAULTS[planted]
    caught(run, planted, monkeypatch, message)
    card.violations()


def test_a_gradient_that_is_read_before_its_copy_ended_is_another_one(card, monkeypatch):
    """The host's own reads have no order: but a copy lands as late as it may, so that they find the bytes of before."""
    wanted, held = trained(), []

    def land(copied, sent, staged, into, filled):
        held.append(sent)
        with torch.no_grad():
            into.add_(staged) if filled else into.copy_(staged)

    assert torch.equal(trained(), wanted)
    monkeypatch.setattr("offload.training.backward.gradient_transfer._land", land)
    for _ in range(TIMES):
        assert not torch.equal(trained(), wanted)
        # What is copied to is let go of too early as well.
        assert card.violations()
        held.clear()
        card.violations()


def test_what_runs_here_is_right(card):
    plain = make("llama")
    twin = oracle_of(plain)
    with torch.inference_mode():
        wanted = twin.generate(tokens(BATCH, 7), max_new_tokens=4, do_sample=False)
    assert torch.equal(generated(), wanted)
