"""Every edit of a weight is seen at the next pass, by whatever view it was written, and outlives the session."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from offload import SessionError, offload
from offload.model.homes import ParameterHome
from offload.runtime.unseen_edits import UnseenEdits
from offload.storage import written_pages
from tests.architectures import make, oracle_of, tokens
from tests.budgets import ALL, NONE, SOME, budget_for, enter, spec_of, training_budget_for
from tests.delayed import DelayedDevice
from tests.offload.test_experts import plan_for
from tests.plans import edited as changed

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

RESERVE = {"batch_size": 2, "max_tokens": 40}

EDITS = {
    "data in place": lambda weight: weight.data.mul_(2),
    "a column of data": lambda weight: weight.data.view(len(weight), -1)[:, 0].zero_(),
    "NumPy": lambda weight: weight.detach().numpy().__setitem__((slice(None), 0), 3),
    "one number": lambda weight: weight.data.view(-1).__setitem__(weight.numel() // 2, 9),
    "in place": lambda weight: weight.detach().add_(1),
    "other data": lambda weight: setattr(weight, "data", weight.data * 3),
    "a swap": lambda weight: weight.data.copy_(weight.data.flip(0)),
}
WEIGHTS = ["model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make("llama").save_pretrained(path)
    return str(path)


def edited(model, edit, names=WEIGHTS):
    with torch.no_grad():
        for name in names:
            edit(model.get_parameter(name))


def assert_seen(model, twin, edit):
    """The next passes compute with it."""
    edited(model, edit)
    edited(twin, edit)
    for _ in range(2):
        assert torch.equal(logits(model), logits(twin))


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("edit", list(EDITS))
@pytest.mark.parametrize("residency", [NONE, SOME, ALL])
@pytest.mark.parametrize("source", ["a path", "mapped", "memory"])
def test_an_edit_counts_from_the_next_pass_and_stays(source, residency, edit, saved, tmp_path):
    twin = make("llama")
    target = saved
    if source == "mapped":
        target = type(twin).from_pretrained(saved).eval()
    if source == "memory":
        target = make("llama")
    spec = spec_of(saved, **RESERVE)
    budget = budget_for(spec, residency, 2, 40) + 65_536
    with enter(target, budget, disk_dir=str(tmp_path), **RESERVE) as session:
        model = session.model
        assert torch.equal(logits(model), logits(twin))
        assert_seen(model, twin, EDITS[edit])
        for name, value in twin.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("edit", list(EDITS))
@pytest.mark.parametrize("host", ["CPU memory", "disk"])
@pytest.mark.parametrize("residency", [NONE, SOME, ALL])
def test_beside_a_device(residency, host, edit, saved, monkeypatch):
    monkeypatch.setattr("offload.api.resolve_device", lambda name: DelayedDevice())
    twin = make("llama")
    spec = spec_of(saved, **RESERVE)
    sizes = {"gpu_memory": budget_for(spec, residency, 2, 40) + 65_536, "cpu_memory": "1GiB"}
    if host == "disk":
        sizes["cpu_memory"] = 4 * max(block.slot_bytes for block in spec.blocks)
    with offload(saved, device="cuda", **sizes, **RESERVE) as session:
        model = session.model
        for _ in range(2):
            assert torch.equal(logits(model), logits(twin))
        assert_seen(model, twin, EDITS[edit])
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("trained", ["adapters", "half of the layers", "all"])
@pytest.mark.parametrize("edit", list(EDITS))
def test_between_the_steps_of_training_beside_a_device(edit, trained, saved, monkeypatch):
    """Frozen weights that were loaded ahead, and those that an optimizer writes."""
    monkeypatch.setattr("offload.api.resolve_device", lambda name: DelayedDevice())
    sizes = {"gpu_memory": training_budget_for(spec_of(saved, **RESERVE), NONE, 2, 40) + 65_536, "cpu_memory": "1GiB"}

    def losses(model):
        torch.manual_seed(4)
        if trained == "adapters":
            config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
            model = get_peft_model(model, config).train()
        if trained == "half of the layers":
            for name, value in model.named_parameters():
                value.requires_grad_("layers.0" in name or "layers.1" in name)
        values = [value for value in model.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(values, lr=0.01, fused=True)
        base = model.get_base_model() if trained == "adapters" else model
        for step in range(4):
            # The first one before anything is known to be trained.
            if step in (0, 2, 3):
                parts = {name.replace(".base_layer", ""): value for name, value in base.named_parameters()}
                with torch.no_grad():
                    for name in WEIGHTS:
                        EDITS[edit](parts[name])
            loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()

    wanted = list(losses(make("llama")))
    with offload(saved, device="cuda", training=True, **sizes, **RESERVE) as session:
        assert list(losses(session.model)) == wanted
        homes = [home for block in session._parts.residency.placement.streamed.values() for home in block.homes]
        assert homes
        # What an optimizer writes does not take memory a second time.
        assert all(home.shield is None for home in homes if home.parameter.requires_grad)
        assert any(home.shield is not None for home in homes) == (trained != "all")


@pytest.mark.parametrize("way", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("residency", [NONE, SOME, ALL])
def test_adapters_are_merged(residency, way, saved, tmp_path):
    adapted = get_peft_model(make("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    twin = PeftModel.from_pretrained(make("llama"), tmp_path / "adapter").eval()
    budget = budget_for(spec_of(saved, **RESERVE), residency, 2, 40) + (1 << 20)
    with enter(saved, budget, **RESERVE) as session:
        ours = PeftModel.from_pretrained(session.model, tmp_path / "adapter").eval()
        assert torch.equal(logits(ours), logits(twin))
        ours, wanted = getattr(ours, way)() or ours, getattr(twin, way)() or twin
        for _ in range(2):
            assert torch.equal(logits(ours), logits(wanted))
        if way == "merge_and_unload":
            ours.save_pretrained(tmp_path / "merged")
            again = type(ours).from_pretrained(tmp_path / "merged")
            assert torch.equal(logits(again), logits(wanted))


EXPERT_EDITS = {
    "data in place": lambda weight: weight.data.mul_(2),
    "one number": lambda weight: weight.data.__setitem__((0, 0, 0), 9.0),
    "NumPy": lambda weight: weight.detach().numpy().__setitem__((slice(None), 0), 3),
    "in place": lambda weight: weight.detach().mul_(2),
}


@pytest.mark.parametrize("edit", list(EXPERT_EDITS))
@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "qwen3_moe"])
def test_experts(name, edit, tmp_path):
    """Seen, or refused where the parameter only stands for what files hold apart."""
    plain = make(name)
    plain.save_pretrained(tmp_path / "model")
    twin = oracle_of(plain)
    which = [key for key, value in twin.named_parameters() if "experts" in key and value.dim() == 3][:1]
    with offload(tmp_path / "model", device="cpu", cpu_memory=1 << 28, plan=plan_for(plain, 4), **RESERVE) as session:
        assert torch.equal(logits(session.model), logits(twin))
        stands_in = not any(session.model.get_parameter(which[0]).stride())
        assert stands_in == (name != "gpt_oss")
        if stands_in:
            with pytest.raises((SessionError, RuntimeError), match=r"stands for experts|single memory location"):
                edited(session.model, EXPERT_EDITS[edit], which)
                logits(session.model)
            return
        edited(session.model, EXPERT_EDITS[edit], which)
        edited(twin, EXPERT_EDITS[edit], which)
        assert torch.equal(logits(session.model), logits(twin))


@pytest.mark.parametrize("edit", list(EDITS))
@pytest.mark.parametrize("what", ["divided", "on the CPU"])
def test_layers_that_the_cpu_computes_with(what, edit, monkeypatch):
    monkeypatch.setattr("offload.api.resolve_device", lambda name: DelayedDevice())
    model, twin = make("llama"), make("llama")
    sizes = {"gpu_memory": budget_for(spec_of(model, **RESERVE), NONE, 2, 40) + 16_384, "cpu_memory": "1GiB"}
    with offload(model, device="cuda", **sizes, **RESERVE) as session:
        plan = session.plan
        streamed = tuple(key for key in plan.weights.in_host_memory if "layers" in key)
    if what == "divided":
        plan = changed(plan, "weights", cpu_percent=40, cpu_gpu_split=streamed)
    else:
        left = {name: tuple(key for key in getattr(plan.weights, name) if key not in streamed[1:2])
                for name in ("streamed", "in_host_memory")}  # fmt: skip
        plan = changed(plan, "weights", computed_on_host=streamed[1:2], **left)
    with offload(model, device="cuda", plan=plan, exactness="rounding", **sizes, **RESERVE) as session:
        torch.testing.assert_close(logits(model), logits(twin), rtol=1e-3, atol=1e-3)
        edited(model, EDITS[edit])
        edited(twin, EDITS[edit])
        for _ in range(2):
            torch.testing.assert_close(logits(model), logits(twin), rtol=1e-3, atol=1e-3)
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_without_a_page_map_it_is_said(saved, monkeypatch):
    monkeypatch.setattr("offload.runtime.unseen_edits.written", lambda ranges: None)
    with enter(saved, 1 << 26, **RESERVE) as session:
        logits(session.model)
        assert any("/proc/self/pagemap" in note for note in session.report().fallbacks)


@pytest.mark.parametrize("way", ["merge_and_unload", "merge_adapter"])
def test_without_a_page_map_merges_are_refused(way, saved, monkeypatch):
    monkeypatch.setattr("offload.runtime.unseen_edits.written", lambda ranges: None)
    with enter(saved, 1 << 26, **RESERVE) as session:
        adapted = get_peft_model(session.model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        logits(adapted)
        merged = getattr(adapted, way)() or adapted
        with pytest.raises(SessionError, match="merge before entering"):
            logits(merged)


def test_both_ways_to_ask_agree(tmp_path, monkeypatch):
    content = torch.zeros(40 * 4096, dtype=torch.uint8)
    torch.save(content, tmp_path / "file")
    mapped = torch.UntypedStorage.from_file(str(tmp_path / "file"), False, 40 * 4096)
    memory = torch.empty(0, dtype=torch.uint8).set_(mapped)
    begin = memory.data_ptr()
    pages = [(begin + index * 4096, begin + (index + 1) * 4096) for index in range(40)]
    memory[:8192].sum()
    for edited_page in (3, 17, 39):
        memory[edited_page * 4096 + 5] = 1
    wanted = [index in (3, 17, 39) for index in range(40)]
    assert written_pages.written(pages) == wanted
    monkeypatch.setattr(written_pages, "_scanned", written_pages._read)
    assert written_pages.written(pages) == wanted
    assert any(low <= begin < high for low, high in written_pages.private_file_ranges())


def test_what_is_not_watched_any_more_is_not_asked_about(tmp_path):
    """Memory where a trained weight once was may be anybody's by now."""
    (tmp_path / "file").write_bytes(bytes(8192))
    mapped = torch.UntypedStorage.from_file(str(tmp_path / "file"), False, 8192)
    memory = torch.empty(0, dtype=torch.uint8).set_(mapped)
    home = ParameterHome("weight", torch.nn.Parameter(memory.view(torch.float32)), memory.view(torch.float32), None)
    edits = UnseenEdits()
    edits.mark([home])
    edits.look_anew()
    home.trained = True
    memory[0] = 1
    edits.mark([home])
    assert not home.modified
