"""A device with memory of its own, simulated: copies end late and out of order, free memory is NaN."""

import pytest
import torch

from offload import BudgetTooSmall, offload
from offload.scheduler.model_spec import Workload
from offload.scheduler.planner import least_budget_bytes
from tests.architectures import BY_NAME, make, oracle_of, tokens
from tests.budgets import ALL, NONE, SOME, budget_for, spec_of
from tests.delayed import DelayedDevice
from tests.poison import overlook_edits

BATCH, MAX_TOKENS = 2, 20
HOST = {"from disk": 2, "from both": 3.5, "from CPU memory": 1000}
"""CPU memory budgets, in sizes of the largest block."""


@pytest.fixture
def device(monkeypatch):
    device = DelayedDevice()
    monkeypatch.setattr("offload.api.resolve_device", lambda name: device)
    # So that the tiny models have more blocks than there are buffers between disk and device.
    monkeypatch.setattr("offload.scheduler.host_memory._STAGING_BUFFERS", 1)
    return device


def host_budget(spec, host):
    return int(HOST[host] * max(block.slot_bytes for block in spec.blocks))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {}

    def save(name):
        if name not in folders:
            path = tmp_path_factory.mktemp(name)
            model = make(name, True)
            model.save_pretrained(path)
            folders[name] = str(path), oracle_of(model), spec_of(str(path))
        return folders[name]

    return save


@pytest.mark.parametrize("host", list(HOST))
@pytest.mark.parametrize("residency", [NONE, SOME])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mixtral"])
def test_identical_from_a_checkpoint(name, residency, host, saved, device, tmp_path):
    folder, twin, spec = saved(name)
    budget = budget_for(spec, residency, BATCH, MAX_TOKENS) + 16_384
    options = {"batch_size": BATCH, "max_tokens": MAX_TOKENS, "disk_dir": tmp_path, "expert_policy": "layers"}
    with offload(folder, gpu_memory=budget, cpu_memory=host_budget(spec, host), **options) as session:
        assert session.plan.weights.streamed
        _poison_what_is_not_the_source(session)
        inputs = BY_NAME[name].inputs()
        with torch.inference_mode():
            for _ in range(3):
                assert torch.equal(session.model(**inputs)[0], twin(**inputs)[0])
            kwargs = {"max_new_tokens": 6, "do_sample": False}
            assert torch.equal(session.model.generate(tokens(), **kwargs), twin.generate(tokens(), **kwargs))
        report = session.report()
        assert report.links["h2d"].bytes > 0
        for tier in report.tiers.values():
            assert tier.budget_bytes is None or tier.peak_bytes <= tier.budget_bytes
        from_host, from_disk = report.blocks["streamed_from_cpu_memory"], report.blocks["streamed_from_disk"]
        assert bool(from_host) == (host != "from disk")
        if residency == NONE:
            assert bool(from_disk) == (host != "from CPU memory")


@pytest.mark.parametrize("host", ["from disk", "from CPU memory"])
def test_looked_up_rows_come_from_memory_where_it_has_room(host, saved, device, tmp_path):
    folder, twin, spec = saved("gpt2")
    budget = budget_for(spec, NONE, BATCH, MAX_TOKENS) + 16_384
    options = {"batch_size": BATCH, "max_tokens": MAX_TOKENS, "disk_dir": tmp_path}
    with offload(folder, gpu_memory=budget, cpu_memory=host_budget(spec, host), **options) as session, torch.inference_mode():
        tables = session.plan.weights.row_fetched
        assert tables
        assert session.plan.weights.tables_in_host_memory == (tables if host == "from CPU memory" else ())
        inputs = BY_NAME["gpt2"].inputs()
        session.model(**inputs)
        loaded = session.report().links["disk"].bytes
        session.model.transformer.wte.weight[3].mul_(2.0)
        twin.transformer.wte.weight[3].mul_(2.0)
        try:
            assert torch.equal(session.model(**inputs)[0], twin(**inputs)[0])
        finally:
            twin.transformer.wte.weight[3].div_(2.0)
        assert (session.report().links["disk"].bytes == loaded) == (host == "from CPU memory")
        with pytest.raises(IndexError, match="row 100000 or"):
            session.model(input_ids=torch.tensor([[1, 100_000]]))


def _poison_what_is_not_the_source(session):
    """Homes are views; blocks come from the memory, or the file, below."""
    overlook_edits(session)
    for block in session._parts.residency.placement.streamed.values():
        for home in block.homes:
            home.tensor.detach().fill_(torch.nan)


@pytest.mark.parametrize("host", list(HOST))
@pytest.mark.parametrize("residency", [NONE, SOME])
def test_a_held_model_is_taken_over_and_given_back(residency, host, device, tmp_path):
    model = make("llama", True)
    twin = oracle_of(model)
    spec = spec_of(model)
    budget = budget_for(spec, residency, BATCH, MAX_TOKENS) + 16_384
    options = {"batch_size": BATCH, "max_tokens": MAX_TOKENS, "disk_dir": tmp_path, "expert_policy": "layers"}
    with offload(model, gpu_memory=budget, cpu_memory=host_budget(spec, host), **options):
        for _ in range(3):
            with torch.no_grad():
                assert torch.equal(model(input_ids=tokens()).logits, twin(input_ids=tokens()).logits)
                model.model.layers[1].mlp.up_proj.weight.mul_(1.1)
                twin.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_residents_are_given_up_for_the_kv_cache(device, saved):
    folder, twin, spec = saved("llama")
    budget = budget_for(spec, ALL, BATCH, MAX_TOKENS) - 8192
    with offload(folder, gpu_memory=budget, cpu_memory="1GiB", batch_size=BATCH, max_tokens=MAX_TOKENS) as session:
        before = len(session.plan.weights.resident)
        long = {"max_new_tokens": 60, "min_new_tokens": 60, "do_sample": False}
        assert torch.equal(session.model.generate(tokens(), **long), twin.generate(tokens(), **long))
        assert len(session.plan.weights.resident) < before
        assert session.machine.ledger.peak_bytes <= budget


def test_a_pass_that_fails_leaves_nothing_in_flight(device, saved):
    folder, twin, spec = saved("llama")
    budget = budget_for(spec, NONE, BATCH, MAX_TOKENS) + 16_384
    with offload(folder, gpu_memory=budget, cpu_memory="1GiB", batch_size=BATCH, max_tokens=MAX_TOKENS) as session:
        for _ in range(5):
            handle = session.model.model.layers[1].register_forward_hook(lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                session.model(input_ids=tokens())
            handle.remove()
            assert torch.equal(session.model(input_ids=tokens()).logits, twin(input_ids=tokens()).logits)
    assert device.in_flight == 0


def test_missing_waits_would_be_seen(device, saved, monkeypatch):
    """A check of the checks: without the wait for a copy, the output is wrong."""
    folder, twin, spec = saved("llama")
    budget = budget_for(spec, NONE, BATCH, MAX_TOKENS) + 16_384
    monkeypatch.setattr(DelayedDevice, "wait", lambda self, event: None)
    with offload(folder, gpu_memory=budget, cpu_memory="1GiB", batch_size=BATCH, max_tokens=MAX_TOKENS) as session:
        outputs = [session.model(input_ids=tokens()).logits for _ in range(3)]
        assert not all(torch.equal(output, twin(input_ids=tokens()).logits) for output in outputs)


def test_too_little_cpu_memory_to_pass_through(device, saved):
    folder, _, spec = saved("llama")
    least = least_budget_bytes(spec, Workload(BATCH, MAX_TOKENS, MAX_TOKENS)) + 16_384
    with (
        pytest.raises(BudgetTooSmall, match="on their way from disk") as refusal,
        offload(folder, gpu_memory=least, cpu_memory=4096, batch_size=BATCH, max_tokens=MAX_TOKENS),
    ):
        pass
    with offload(
        folder, gpu_memory=least, cpu_memory=refusal.value.least_bytes, batch_size=BATCH, max_tokens=MAX_TOKENS
    ) as session:
        session.model(input_ids=tokens())
