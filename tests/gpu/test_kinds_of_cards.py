"""Cards as people have them: with libraries that keep memory, without bfloat16, with a display, with others beside."""

import threading

import pytest
import torch

from offload import BudgetTooSmall, ConfigError, DeviceFull, offload
from offload.budgets import resolve_budgets
from offload.storage.devices import cuda
from offload.storage.devices.cuda import CudaDevice
from tests.architectures import make, tokens
from tests.budgets import NONE, budget_for, spec_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]

RESERVE = {"batch_size": 2, "max_tokens": 40}
WORKSPACE = 8 << 20


@pytest.fixture
def with_workspaces(card, monkeypatch):
    """cuBLAS was not used yet, and will keep so much for each thread."""
    monkeypatch.setattr(cuda, "_WORKSPACES", {})
    card.set_workspace(WORKSPACE)
    yield card
    card.set_workspace(0)


def test_what_libraries_keep_is_in_the_budget(with_workspaces):
    model = make("llama")
    before = torch.cuda.memory_allocated()
    budget = budget_for(spec_of(model, **RESERVE), NONE, 2, 40) + 65_536
    with pytest.raises(BudgetTooSmall) as refused, offload(model, device="cuda", gpu_memory=budget, **RESERVE):
        pass
    least = refused.value.least_bytes
    assert budget < least <= budget + WORKSPACE
    torch.cuda.reset_peak_memory_stats()
    with offload(model, device="cuda", gpu_memory=least, cpu_memory="1GiB", **RESERVE) as session, torch.inference_mode():
        session.model(tokens().cuda())
        peak = session.report().peak
    assert torch.cuda.max_memory_allocated() - before <= least
    assert peak.measured_bytes <= peak.predicted_bytes <= least


def test_they_are_measured_once_a_process(with_workspaces):
    assert CudaDevice(0).workspace_bytes == WORKSPACE
    found = []
    # Another thread has its own; the figure is that of one.
    thread = threading.Thread(target=lambda: found.append(CudaDevice(0).workspace_bytes))
    thread.start()
    thread.join()
    assert found == [WORKSPACE]
    assert resolve_budgets(CudaDevice(0), "1GiB", "1GiB", 0).workspace_bytes == WORKSPACE


def test_a_card_without_bfloat16_is_told_with_its_cost(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    said = {}
    for dtype in (torch.bfloat16, torch.float16):
        with offload(make("llama", dtype=dtype), device="cuda", gpu_memory="256MiB", cpu_memory="1GiB", **RESERVE) as session:
            session.model(tokens().cuda())
            said[dtype] = [note for note in session.report().fallbacks if "emulates" in note]
    assert "float16" in said[torch.bfloat16][0]
    assert not said[torch.float16]


def test_what_is_free_is_asked_each_time(card):
    device = CudaDevice(0)
    before = resolve_budgets(device, None, "1GiB", 0).device_bytes
    others = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    assert resolve_budgets(device, None, "1GiB", 0).device_bytes <= before - (400 << 20)
    with pytest.raises(ConfigError, match=r"gpu_memory=.* was asked for, and .* is free"):
        offload(make("llama"), device="cuda", gpu_memory=before * 10 // 9 + (1 << 20), cpu_memory="1GiB").__enter__()
    del others


def test_memory_that_somebody_took_meanwhile_is_told():
    device = CudaDevice(0)
    with pytest.raises(DeviceFull, match=r"were asked for, and .* is free by now.*expandable_segments"):
        device.allocate(device.free_bytes() + (1 << 30))
    # The card goes on.
    assert torch.ones(4, device="cuda").sum().item() == 4
