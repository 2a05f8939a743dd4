"""Where a system allows little page-locked memory (WSL2): the same bits, copies that nobody waits for, and a sentence."""

import pytest
import torch

from offload import offload
from offload.model.experts import find_experts
from offload.storage.devices.cuda import CudaDevice
from tests.architectures import make, oracle_of, tokens
from tests.gpu.test_host_waits import END_OF_PASS, by_place
from tests.gpu.test_overlap import decoding, model, streamed
from tests.gpu.test_training import same, trained
from tests.gpu.timed import waits_of
from tests.offload.test_experts import beside

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]

RING = "offload/storage/pageable_copies.py"


LIMITS = [0, 300_000, 700_000]
"""Nothing; too little for a ring; a ring, and one block."""


@pytest.fixture
def allow(monkeypatch):
    """A function that limits the bytes that may be page-locked."""
    held: dict[int, int] = {}
    lock, unlock = CudaDevice.lock_pages, CudaDevice.unlock_pages

    def given_back(self, buffer):
        held.pop(buffer.address, None)
        unlock(self, buffer)

    def limit(nbytes):
        def limited(self, buffer):
            if sum(held.values()) + buffer.nbytes > nbytes or not lock(self, buffer):
                return False
            held[buffer.address] = buffer.nbytes
            return True

        monkeypatch.setattr(CudaDevice, "lock_pages", limited)
        monkeypatch.setattr(CudaDevice, "unlock_pages", given_back)

    yield limit
    assert not held


def said(session):
    return [note for note in session.report().fallbacks if "page-locked" in note]


@pytest.mark.parametrize("limit", LIMITS)
def test_streamed_weights(limit, allow):
    allow(limit)
    plain = model()
    twin = oracle_of(plain).to("cuda")
    ids = tokens(1, 9).cuda()
    with streamed(plain) as session, torch.no_grad():
        assert session.plan.weights.in_host_memory
        for _ in range(3):
            assert torch.equal(session.model(ids).logits, twin(ids).logits)
        assert said(session)


@pytest.mark.parametrize("limit", LIMITS)
def test_experts(limit, allow, tmp_path):
    allow(limit)
    plain = make("mixtral")
    plain.save_pretrained(tmp_path / "model")
    twin = oracle_of(plain).to("cuda")
    total = sum(unit.count for unit in find_experts(plain))
    ids = tokens().cuda()
    options = {"gpu_memory": 1 << 30, "cpu_memory": 1 << 30, "batch_size": 2, "max_tokens": 40}
    plan = beside(plain, 4, total)
    with offload(tmp_path / "model", device="cuda", plan=plan, **options) as session, torch.no_grad():
        for _ in range(3):
            assert torch.equal(session.model(ids).logits, twin(ids).logits)


def test_training(allow):
    """Gradients leave, and weights come, through memory that is not page-locked."""
    wanted = trained(True)
    allow(0)
    same(trained(True), wanted)


def test_nobody_waits_for_the_copies(allow, card):
    allow(LIMITS[-1])
    with streamed(model()) as session, torch.inference_mode():
        waits = by_place(waits_of(card, decoding(session)))
        assert len(session._parts.machine.host.memory._pageable) > 2
    # The ring's own thread waits until a buffer is empty.
    waits.pop(RING, None)
    assert waits == {END_OF_PASS: 1}
