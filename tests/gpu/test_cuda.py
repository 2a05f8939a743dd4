"""On a CUDA card: exactness, overlap, slot safety under delayed copies, peak memory. Run: python -m pytest tests/gpu -m gpu"""

import warnings

import pytest
import torch

from offload import StaleSlot, offload
from offload.synth import synthesize
from tests.architectures import BY_NAME, make, oracle_of, tokens
from tests.budgets import ALL, NONE, SOME, budget_for, spec_of
from tests.plans import edited
from tests.storage.test_devices import DeviceContract

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card"),
]

BATCH, MAX_TOKENS = 4, 24
HOST = {"from disk": 2, "from CPU memory": 1000}


class TestCuda(DeviceContract):
    @pytest.fixture
    def device(self):
        from offload.storage.devices.cuda import CudaDevice

        return CudaDevice(0)

    def test_page_locking_takes_the_exact_size_and_gives_it_back(self, device):
        from offload.storage.host_buffer import HostBuffer

        for _ in range(3):
            buffer = HostBuffer(5 << 20)
            assert device.lock_pages(buffer)
            assert buffer.tensor.is_pinned()
            device.unlock_pages(buffer)
            assert not buffer.tensor.is_pinned()

    def test_a_refused_lock_leaves_no_error_behind(self, device):
        from offload.storage.host_buffer import HostBuffer

        buffer = HostBuffer(1 << 20)
        assert device.lock_pages(buffer)
        assert not device.lock_pages(buffer)
        assert int(torch.ones(3, device=device.torch_device).sum()) == 3
        device.unlock_pages(buffer)

    def test_fresh_memory_is_not_written_before_compute_is_through_with_it(self, device):
        """torch hands out again what was freed in the order of the compute stream, whose kernels may not have run yet."""
        from offload.storage.host_buffer import HostBuffer

        nbytes = 48 << 20
        source = HostBuffer(nbytes)
        source.tensor.fill_(1)
        assert device.lock_pages(source)
        freed = torch.empty(nbytes, dtype=torch.uint8, device=device.torch_device)
        address = freed.data_ptr()
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)
        freed.fill_(7)
        del freed
        buffer = device.allocate(nbytes)
        assert buffer.tensor.data_ptr() == address
        device.copy_in([(buffer.tensor[:nbytes], source.tensor)])
        torch.cuda.synchronize()
        assert bool((buffer.tensor[:nbytes] == 1).all())
        device.unlock_pages(source)


def on_card(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.cuda()
    for buffer in model.buffers():
        buffer.data = buffer.data.cuda()
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {}

    def save(name, dtype):
        if (name, dtype) not in folders:
            path = tmp_path_factory.mktemp(name)
            make(name, True, dtype).save_pretrained(path)
            folders[name, dtype] = str(path), spec_of(str(path))
        folder, spec = folders[name, dtype]
        return folder, on_card(make(name, True, dtype)), spec

    return save


@pytest.mark.parametrize("host", list(HOST))
@pytest.mark.parametrize("residency", [NONE, SOME, ALL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "mixtral", "t5", "bert", "clip"])
def test_identical(name, dtype, residency, host, saved, tmp_path):
    folder, plain, spec = saved(name, dtype)
    budget = budget_for(spec, residency, BATCH, MAX_TOKENS, "cuda") + 65_536
    cpu = HOST[host] * max(block.slot_bytes for block in spec.blocks)
    # Single experts pass through buffers of their own.
    cpu += 4 * max(block.slot_bytes for block in spec.blocks) if name == "mixtral" else 0
    inputs = BY_NAME[name].inputs()
    on_device = {key: value.cuda() for key, value in inputs.items()}
    options = {"batch_size": BATCH, "max_tokens": MAX_TOKENS, "disk_dir": tmp_path}
    with offload(folder, device="cuda", gpu_memory=budget, cpu_memory=cpu, **options) as session, torch.inference_mode():
        assert session.model.device.type == "cuda"
        for _ in range(3):
            for given in (inputs, on_device):
                got, wanted = session.model(**given), plain(**on_device)
                for mine, theirs in zip(got.to_tuple(), wanted.to_tuple(), strict=True):
                    if isinstance(mine, torch.Tensor):
                        assert torch.equal(mine, theirs)
        if BY_NAME[name].generates:
            ids = tokens().cuda()
            for kwargs in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
                wanted = plain.generate(ids, max_new_tokens=6, do_sample=False, disable_compile=True, **kwargs)
                assert torch.equal(session.model.generate(ids, max_new_tokens=6, do_sample=False, **kwargs), wanted)


@pytest.mark.parametrize("slow", ["copies", "compute"])
def test_slots_are_safe_when_one_side_is_slow(slow, saved, monkeypatch):
    """Copies that start late, or compute that ends late, with slots that hold NaN before a copy arrives."""
    from offload.storage.devices.cuda import CudaDevice

    real = CudaDevice.copy_in
    cycles = 20_000_000

    def delayed(self, copies, after=(), name=""):
        with self._on(self._copies):
            for event in after:
                if event is not None:
                    self._copies.wait_event(event)
            for target, _ in copies:
                target.view(-1).view(torch.uint8).fill_(0xFF)
            if slow == "copies":
                torch.cuda._sleep(cycles)
        return real(self, copies, after, name)

    monkeypatch.setattr(CudaDevice, "copy_in", delayed)
    folder, plain, spec = saved("llama", torch.float32)
    budget = budget_for(spec, NONE, BATCH, MAX_TOKENS, "cuda") + 65_536
    with offload(
        folder, device="cuda", gpu_memory=budget, cpu_memory="1GiB", max_tokens=MAX_TOKENS, batch_size=BATCH
    ) as session:
        if slow == "compute":
            for layer in session.model.model.layers:
                layer.mlp.register_forward_pre_hook(lambda module, args: torch.cuda._sleep(cycles))
        with torch.inference_mode():
            for _ in range(4):
                assert torch.equal(session.model(tokens().cuda()).logits, plain(tokens().cuda()).logits)


def test_backward_raises(saved):
    folder, _, spec = saved("llama", torch.float32)
    budget = budget_for(spec, NONE, BATCH, MAX_TOKENS, "cuda") + 65_536
    with offload(
        folder, device="cuda", gpu_memory=budget, cpu_memory="1GiB", max_tokens=MAX_TOKENS, batch_size=BATCH
    ) as session:
        loss = session.model(tokens().cuda(), labels=tokens().cuda()).loss
        with pytest.raises(StaleSlot):
            loss.backward()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    if torch.cuda.get_device_name() == "pretended card":
        pytest.skip("the pretended card takes no time: its own clock shows overlap (tests/gpu/test_overlap.py)")
    folder = tmp_path_factory.mktemp("large") / "model"
    synthesize(str(folder), 4_000_000_000)
    return str(folder)


def test_copies_run_while_the_card_computes(large):
    """In a long prefill the link and the compute are busy at the same time: together longer than the wall."""
    with (
        torch.inference_mode(),
        offload(large, device="cuda", gpu_memory="2GiB", cpu_memory="16GiB", max_tokens=2048) as session,
    ):
        assert session.plan.weights.streamed
        assert not [sentence for sentence in session.report().fallbacks if "page-locked" in sentence]
        ids = torch.randint(3, 1000, (1, 2040)).cuda()
        session.model(ids, logits_to_keep=1)
        before = session.report()
        session.model(ids, logits_to_keep=1)
        after = session.report()
        copying = after.links["h2d"].seconds - before.links["h2d"].seconds
        wall = after.prefill.seconds - before.prefill.seconds
        stalled = sum(after.prefill.wait_seconds.values()) - sum(before.prefill.wait_seconds.values())
        assert copying > 0
        assert (wall - stalled) + copying > 1.1 * wall, "the link and the card took turns"


PARTS = {
    "micro-batches": ("splits", {"micro_batch": 2}),
    "chunks": ("splits", {"prefill_chunk": 4}),
    "divided": ("weights", {"cpu_percent": 40}),
    "on the CPU": ("weights", {}),
}


@pytest.mark.parametrize("what", list(PARTS))
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_what_is_taken_apart_computes_the_same(name, what):
    """Level rounding: close to the plain model on the card, with the same tokens in fp32."""
    model = make(name)
    twin = on_card(oracle_of(model))
    reserve = {"batch_size": BATCH, "max_tokens": MAX_TOKENS}
    budget = budget_for(spec_of(model, **reserve), NONE, BATCH, MAX_TOKENS, "cuda") + 16_384
    with offload(model, device="cuda", gpu_memory=budget, cpu_memory="1GiB", **reserve) as session:
        plan = session.plan
        layers = {block.key for block in session._parts.residency.spec.layers}
    streamed = tuple(key for key in plan.weights.in_host_memory if key in layers)
    section, changes = PARTS[what]
    changes = dict(changes)
    if what == "divided":
        changes["cpu_gpu_split"] = streamed
    if what == "on the CPU":
        taken = streamed[1::2]
        changes |= {
            name: tuple(key for key in getattr(plan.weights, name) if key not in taken)
            for name in ("streamed", "in_host_memory")
        }
        changes["computed_on_host"] = taken
    plan = edited(plan, section, **changes)
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    ids = tokens(BATCH, 9).cuda()
    with offload(
        model, device="cuda", gpu_memory=budget, cpu_memory="1GiB", plan=plan, exactness="rounding", **reserve
    ) as session:
        found = session.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        assert session.report().exactness == "rounding"
    wanted = twin.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(found.sequences.cpu(), wanted.sequences.cpu())
    for ours, theirs in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=1e-3, atol=1e-3)


def test_peak_device_memory_is_within_the_budget(large):
    # Its workspace is cuBLAS's own, and stays.
    torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()
    with (
        torch.inference_mode(),
        offload(large, device="cuda", gpu_memory="2GiB", cpu_memory="16GiB", max_tokens=256) as session,
    ):
        session.model.generate(torch.randint(3, 1000, (1, 200)).cuda(), max_new_tokens=20, do_sample=False)
        assert session.machine.device.peak_bytes() - base <= 2 << 30
        peak = session.report().peak
        assert peak.measured_bytes <= peak.predicted_bytes
    assert torch.cuda.memory_allocated() <= base + (8 << 20)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("residency", [NONE, SOME])
def test_adapters_are_trained_on_the_card(residency):
    """Losses and adapters of the plain model on the card; slots that are reused under a gradient would show here."""
    from peft import LoraConfig, get_peft_model

    def trained(model, device):
        torch.manual_seed(3)
        adapted = (
            get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).to(device).train()
        )
        optimizer = torch.optim.AdamW([value for value in adapted.parameters() if value.requires_grad], lr=1e-2)
        losses = []
        for step in range(4):
            ids = tokens(BATCH, 9).to(device) if step % 2 else tokens(BATCH, 9).flip(0).to(device)
            loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model = make("llama")
    twin = on_card(oracle_of(model))
    reserve = {"batch_size": BATCH, "max_tokens": MAX_TOKENS}
    budget = budget_for(spec_of(model, **reserve), residency, BATCH, MAX_TOKENS, "cuda") + (1 << 20)
    with (
        warnings.catch_warnings(),
        offload(model, device="cuda", gpu_memory=budget, cpu_memory="1GiB", training=True, **reserve) as session,
    ):
        warnings.simplefilter("ignore")
        losses = trained(session.model, "cuda")
    assert losses == trained(twin, "cuda")


def test_a_second_session_measures_its_own_peak(saved):
    """What the first one left in reference cycles is not held when the second one begins."""
    folder, _, spec = saved("llama", torch.float32)
    budget = budget_for(spec, SOME, BATCH, MAX_TOKENS, "cuda") + 65_536
    peaks = []
    for _ in range(2):
        options = {"gpu_memory": budget, "cpu_memory": "1GiB", "max_tokens": MAX_TOKENS, "batch_size": BATCH}
        with offload(folder, device="cuda", **options) as session, torch.inference_mode():
            session.model(tokens().cuda())
            peaks.append(session.report().peak.measured_bytes)
            with pytest.warns(UserWarning, match="computes on cuda:0 already"):
                session.model.cuda()
    assert peaks[1] >= 0.95 * peaks[0]
