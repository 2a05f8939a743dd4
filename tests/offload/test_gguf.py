"""GGUF files, streamed as they are: equal to the model that transformers decodes from them."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offload import Training, offload
from offload.cli.main import main
from offload.errors import CheckpointError, ConfigError, PlanError, UnsupportedCheckpoint
from offload.model.placeholders import is_placeholder
from offload.planning.fit import decode_workspace_bytes
from tests.budgets import NONE, budget_for, spec_of
from tests.delayed import DelayedDevice
from tests.poison import moved_in_a_pass, poison_homes

gguf = pytest.importorskip("gguf")
from tests.gguf_files import plainly_read, write_gguf  # noqa: E402
from tests.real_models import smollm2  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

MIXED = ["Q4_K", "Q8_0", "Q6_K", "Q4_0", "IQ4_XS", "F16", "Q5_1", "BF16", "Q2_K", "Q3_K", "MXFP4", "Q5_K", "Q4_1"]
TOKENS = torch.arange(3, 19).view(2, 8)
ARCHITECTURES = ["llama", "qwen3", "gemma2"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLOAD_PROFILES", str(tmp_path / "cache"))


@pytest.mark.parametrize("budget", ["3MiB", "64MiB"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_to_transformers_reading(architecture, tied, dtype, budget, tmp_path, decoders):
    path = write_gguf(tmp_path / "model.gguf", architecture, MIXED, tied)
    plain = plainly_read(path, architecture, dtype, tied)
    options = {"dtype": dtype, "batch_size": 2, "max_tokens": 16}
    with torch.no_grad():
        wanted = plain(TOKENS).logits
        wanted_text = plain.generate(TOKENS, max_new_tokens=6, do_sample=False)
        with offload(path, device="cpu", cpu_memory=budget, **options) as session:
            poison_homes(session)
            with torch.inference_mode():
                assert torch.equal(session.model(TOKENS).logits, wanted)
            assert torch.equal(session.model(TOKENS).logits, wanted)
            assert torch.equal(session.model.generate(TOKENS, max_new_tokens=6, do_sample=False), wanted_text)
            assert bool(session.plan.weights.streamed) == (budget == "3MiB")
            assert session.report().exactness == "identical"


def test_what_travels_is_the_small_form(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", ["Q4_0"])
    with torch.no_grad(), offload(path, device="cpu", cpu_memory="3MiB", max_tokens=16, batch_size=2) as session:
        session.model(TOKENS)
        moved = moved_in_a_pass(session, TOKENS)
        streamed = [value for key in session.plan.weights.streamed for value in session.model.get_submodule(key).parameters()]
    small = sum(value.numel() * 18 // 32 if value.dim() > 1 else value.numel() * 4 for value in streamed)
    assert small <= moved <= 1.02 * small + TOKENS.numel() * 256


def keeping_layers(path, budget, count, **options):
    """The plan of that budget, with so many of the layers that it streams kept in their stored form."""
    with offload(path, device="cpu", cpu_memory=budget, **options) as session:
        weights = session.plan.weights
        kept = [key for key in weights.streamed if "layers" in key][:count]
        return replace(session.plan, weights=replace(weights, in_host_memory=tuple(kept)))


@pytest.mark.parametrize("count", [1, 3])
def test_layers_are_kept_in_their_stored_form(count, tmp_path, decoders):
    path = write_gguf(tmp_path / "model.gguf", "llama", MIXED)
    plain = plainly_read(path, "llama", torch.bfloat16)
    options = {"max_tokens": 16, "batch_size": 2}
    plan = keeping_layers(path, "3MiB", count, **options)
    with torch.no_grad(), offload(path, device="cpu", cpu_memory="5MiB", plan=plan, **options) as session:
        poison_homes(session)
        for _ in range(2):
            assert torch.equal(session.model(TOKENS).logits, plain(TOKENS).logits)
        blocks = {block.key: block for block in session.plan.weights.blocks}
        kept = session.plan.weights.in_host_memory
        assert len(kept) == count
        assert session.plan.weights.encoded_bytes == sum(blocks[key].host_bytes for key in kept)
        others = sum(blocks[key].stored_bytes for key in session.plan.weights.streamed if key not in kept)
        assert moved_in_a_pass(session, TOKENS) <= 1.02 * others + TOKENS.numel() * 256
        held = session.report().tiers["cpu"].at_peak_bytes
        assert held["streamed weights"] == session.plan.weights.encoded_bytes
        name = f"{kept[0]}.self_attn.q_proj.weight"
        changed = plain.get_parameter(name) * 0.5
        for model in (plain, session.model):
            model.get_parameter(name).data = changed.clone()
        assert torch.equal(session.model(TOKENS).logits, plain(TOKENS).logits)


@pytest.mark.parametrize("place", ["computed_on_host", "cpu_gpu_split"])
def test_on_a_cpu_a_plan_cannot_compute_encoded_layers_beside_it(place, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", ["Q4_0"])
    plan = keeping_layers(path, "3MiB", 1, max_tokens=16)
    (kept,) = plan.weights.in_host_memory
    changes = {place: (kept,)}
    if place == "computed_on_host":
        changes |= {"streamed": tuple(key for key in plan.weights.streamed if key != kept), "in_host_memory": ()}
    else:
        changes["cpu_percent"] = 50
    wrong = replace(plan, weights=replace(plan.weights, **changes))
    with (
        pytest.raises(PlanError),
        offload(path, device="cpu", cpu_memory="5MiB", plan=wrong, max_tokens=16, exactness="rounding"),
    ):
        pass


def test_what_is_kept_gives_way_to_a_longer_sequence(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", MIXED)
    plain = plainly_read(path, "llama", torch.bfloat16)
    plan = keeping_layers(path, "3MiB", 3, max_tokens=16)
    kept = sum(block.host_bytes for block in plan.weights.blocks if block.key in plan.weights.in_host_memory)
    budget = plan.device_bytes + kept + (1 << 16)
    longer = torch.arange(200).repeat(2, 1) + 3
    with torch.no_grad(), offload(path, device="cpu", cpu_memory=budget, plan=plan, max_tokens=16) as session:
        assert torch.equal(session.model(TOKENS[:1]).logits, plain(TOKENS[:1]).logits)
        assert len(session.plan.weights.in_host_memory) == 3
        assert torch.equal(session.model(longer).logits, plain(longer).logits)
        assert len(session.plan.weights.in_host_memory) < 3
        assert any("were given up" in note for note in session.report().fallbacks)


@pytest.mark.parametrize("host", [2, 1000], ids=["from disk", "from CPU memory"])
@pytest.mark.parametrize("locked", [True, False], ids=["page-locked", "pageable"])
def test_beside_a_device_the_stored_form_crosses_the_bus(host, locked, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf", "llama", MIXED)
    plain = plainly_read(path, "llama", torch.bfloat16)
    device = DelayedDevice()
    device.lock_pages = lambda buffer: locked
    monkeypatch.setattr("offload.api.resolve_device", lambda name: device)
    spec = spec_of(path, batch_size=2, max_tokens=16)
    largest = max(block.slot_bytes for block in spec.blocks)
    budget = budget_for(spec, NONE, 2, 16) + decode_workspace_bytes(spec)
    options = {"gpu_memory": budget, "cpu_memory": host * largest, "batch_size": 2, "max_tokens": 16}
    with torch.no_grad(), offload(path, **options) as session:
        weights = session.plan.weights
        assert (set(weights.in_host_memory) == set(weights.streamed)) == (host == 1000)
        poison_homes(session)
        for _ in range(3):
            device.ended_copies()
            assert torch.equal(session.model(TOKENS).logits, plain(TOKENS).logits)
        crossed = sum(copy.nbytes for copy in device.ended_copies() if "layers" in copy.name)
    blocks = {block.key: block for block in spec.blocks}
    layers = [blocks[key] for key in weights.streamed if "layers" in key]
    assert sum(block.stored_bytes for block in layers) <= crossed <= sum(block.encoded_bytes for block in layers)


def test_whoever_asks_for_the_values_gets_them(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", MIXED)
    wanted = plainly_read(path, "llama", torch.bfloat16).state_dict()
    with torch.no_grad():
        with offload(path, device="cpu", cpu_memory="4MiB", max_tokens=16) as session:
            first = session.model(TOKENS[:1]).logits
            inside = {name: value.clone() for name, value in session.model.state_dict().items()}
            assert torch.equal(session.model(TOKENS[:1]).logits, first)
        model = session.model
        for each in (copy.deepcopy(model), model):
            assert torch.equal(each(TOKENS[:1]).logits, first)
    for name, value in wanted.items():
        assert torch.equal(inside[name], value), name
        assert torch.equal(model.state_dict()[name], value), name


def test_tensors_that_nothing_uses_are_told(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", ["Q4_0"], more=("rope_freqs.weight",))
    with offload(path, device="cpu", cpu_memory="64MiB", max_tokens=16) as session:
        assert any("not used by the model, such as rope_freqs.weight" in sentence for sentence in session.report().fallbacks)


def test_left_alone_it_holds_no_memory_afterwards(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", ["Q4_0"])
    with torch.no_grad(), offload(path, device="cpu", cpu_memory="64MiB", max_tokens=16) as session:
        session.model(TOKENS[:1])
    assert all(is_placeholder(value.data) for value in session.model.parameters())


@pytest.mark.parametrize("budget", ["4MiB", "64MiB"])
def test_an_edit_counts_and_stays(tmp_path, budget):
    path = write_gguf(tmp_path / "model.gguf", "llama", ["Q4_0"])
    plain = plainly_read(path, "llama", torch.bfloat16)
    with torch.no_grad():
        with offload(path, device="cpu", cpu_memory=budget, max_tokens=16) as session:
            session.model(TOKENS[:1])
            for model in (session.model, plain):
                model.model.norm.weight.mul_(1.5)
            if budget == "64MiB":
                for model in (session.model, plain):
                    model.model.layers[1].mlp.up_proj.weight.mul_(0.5)
            wanted = plain(TOKENS[:1]).logits
            assert torch.equal(session.model(TOKENS[:1]).logits, wanted)
        assert torch.equal(session.model(TOKENS[:1]).logits, wanted)


def test_adapters_are_trained_on_it_and_its_weights_are_not(tmp_path):
    pytest.importorskip("peft")
    path = write_gguf(tmp_path / "model.gguf", "llama", ["Q4_0", "Q8_0"])
    losses = {}
    for way in ("streamed", "plain"):
        torch.manual_seed(0)
        if way == "plain":
            losses[way] = _trained(plainly_read(path, "llama", torch.float32))
            continue
        options = {"device": "cpu", "cpu_memory": "10MiB", "max_tokens": 16, "batch_size": 2, "dtype": torch.float32}
        with offload(path, training=Training(), **options) as session:
            losses[way] = _trained(session.model)
            assert session.plan.weights.streamed
    assert losses["streamed"] == losses["plain"]
    with pytest.raises(ConfigError, match="adapters"), offload(path, device="cpu", training=Training(full=True)):
        pass


def _trained(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([value for value in adapted.parameters() if value.requires_grad], lr=1e-2)
    found = []
    for _ in range(4):
        loss = adapted(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_the_command_takes_the_file_or_its_folder(tmp_path, capsys):
    path = write_gguf(tmp_path / "model.gguf", "llama", ["Q8_0"])
    told = []
    for place in (path, str(tmp_path)):
        assert main(["generate", place, "--prompt", "And the king", "--max-new-tokens", "4", "--device", "cpu", "--quiet"]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    assert main(["plan", path, "--cpu-memory", "4MiB"]) == 0
    assert main(["merge", path, "--adapter", "none", "--output", str(tmp_path / "merged")]) == 1
    assert "is quantised" in capsys.readouterr().err
    Path(tmp_path, "other.gguf").write_bytes(b"GGUF")
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 1
    assert "2 GGUF checkpoints" in capsys.readouterr().err


def test_a_checkpoint_in_parts(tmp_path, capsys):
    """The head is in the last one: transformers, which sees the first, would take it for tied."""
    whole = write_gguf(tmp_path / "whole.gguf", "llama", ["Q4_0", "Q8_0"], tied=False)
    wanted = plainly_read(whole, "llama", torch.bfloat16, tied=False)(TOKENS).logits
    folder = tmp_path / "parts"
    folder.mkdir()
    write_gguf(folder / "model.gguf", "llama", ["Q4_0", "Q8_0"], tied=False, part_tensors=9)
    parts = sorted(folder.iterdir())
    assert len(parts) == 4
    for place in (folder, parts[0], parts[2]):
        with torch.no_grad(), offload(str(place), device="cpu", cpu_memory="4MiB", max_tokens=16, batch_size=2) as session:
            assert torch.equal(session.model(TOKENS).logits, wanted)
    Path(whole).rename(folder / "whole.gguf")
    with pytest.raises(
        UnsupportedCheckpoint, match=r"2 GGUF checkpoints .* name one, like gguf_file=model-00001-of-00004.gguf"
    ):
        offload(str(folder), device="cpu").__enter__()
    with pytest.raises(CheckpointError, match=r"gguf_file no\.gguf is not in"):
        offload(str(folder), device="cpu", gguf_file="no.gguf").__enter__()
    asked = ["generate", str(folder), "--prompt", "And", "--max-new-tokens", "2", "--cpu-memory", "4MiB", "--device", "cpu"]
    assert main([*asked, "--gguf-file", "whole.gguf"]) == 0
    assert main(["plan", str(folder), "--gguf-file", parts[0].name, "--device", "cpu", "--cpu-memory", "16MiB"]) == 0
    assert main(asked) == 1
    assert "--gguf-file" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"the file .*none\.gguf is not there"):
        offload(str(folder / "none.gguf"), device="cpu").__enter__()
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00004\.gguf is not there: .* is one of 4 parts"):
        offload(str(parts[0]), device="cpu").__enter__()


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = Path(write_gguf(tmp_path / "model.gguf", "llama", ["Q8_0"]))
    content = path.read_bytes()
    short = tmp_path / "short.gguf"
    for size in (3, 100, 5000, len(content) - 4096):
        short.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="short"), offload(str(short), device="cpu"):
            pass
    other = tmp_path / "other.gguf"
    other.write_bytes(content.replace(b"general.architecture", b"general.architecturf", 1))
    with pytest.raises(CheckpointError), offload(str(other), device="cpu"):
        pass
    with monkeypatch.context() as patched:
        patched.setattr("offload.storage.gguf_header.GGML_TYPES", {0: ("F32", 1, 4)})
        with pytest.raises(UnsupportedCheckpoint, match="stored as type 8"), offload(str(path), device="cpu"):
            pass


@pytest.mark.slow
def test_a_real_one_knows_the_capital_of_france():
    """SmolLM2, 257 MiB in bf16, streamed from its 94 MiB in a budget of 80: token by token what transformers' own load says."""
    import transformers as hf

    path = smollm2()
    tokenizer = hf.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    plain = hf.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16).eval()
    greedy = {"max_new_tokens": 12, "do_sample": False}
    wanted = plain.generate(**asked, **greedy)
    with offload(path, device="cpu", cpu_memory="80MiB", max_tokens=64, dtype="bfloat16") as session:
        poison_homes(session)
        said = session.model.generate(**asked, **greedy)
        assert session.report().exactness == "identical"
    assert torch.equal(said, wanted)
    assert "Paris" in tokenizer.decode(said[0])
