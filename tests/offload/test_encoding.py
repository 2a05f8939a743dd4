"""Plain checkpoints whose weights are encoded here: equal to the plain model with the decoded values, and near the original."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
import transformers as hf

from offload import Training, offload
from offload.cli.main import main
from offload.errors import ConfigError
from offload.model.encoding import GROUP, KINDS, Encoding
from offload.model.quantised.encoding import NF4, _form, encode
from tests.poison import moved_in_a_pass, poison_homes

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

TOKENS = torch.arange(3, 19).view(2, 8)
SIZES = {"vocab_size": 96, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


def saved(folder, kind=hf.LlamaConfig, **sizes):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(kind(**SIZES, **sizes), dtype=torch.bfloat16).eval()
    model.save_pretrained(folder)
    return str(folder), model


def decoded(values, kind):
    parts = [*encode(values, kind), *([torch.tensor(NF4)] if kind == "nf4" else [])]
    out = torch.empty(values.shape)
    _form(kind, values.shape).codec.decode([part.contiguous().view(torch.uint8).view(-1) for part in parts], out)
    return out


@pytest.mark.parametrize(("kind", "levels", "most"), [("int8", 127, 0.01), ("int4", 8, 0.13), ("nf4", 6.5, 0.13)])
def test_what_is_encoded_is_near(kind, levels, most):
    torch.manual_seed(0)
    values = torch.randn(64, 8 * GROUP) * torch.logspace(-3, 2, 64)[:, None]
    values[3] = 0
    got = decoded(values, kind)
    assert torch.equal(got[3], torch.zeros(8 * GROUP))
    grouped = (values if kind == "int8" else values.view(-1, GROUP)).abs().amax(1, keepdim=True)
    error = (got - values).view(len(grouped), -1).abs()
    assert (error <= 1.02 * grouped / levels).all()
    assert (got - values).norm() < most * values.norm()
    # What was decoded is encoded to itself, but for what a scale in bfloat16 rounds.
    assert torch.allclose(decoded(got, kind), got, rtol=0.01, atol=0)


@pytest.mark.parametrize("budget", ["2700KiB", "64MiB"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("head", [None, "as-is"], ids=["head", "plain head"])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_plain_model_with_the_decoded_weights(kind, head, tied, budget, tmp_path, decoders):
    folder, model = saved(tmp_path / "model", tie_word_embeddings=tied)
    original = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"batch_size": 2, "max_tokens": 16, "weights": kind, "weights_head": head}
    with torch.no_grad():
        for name, value in model.named_parameters():
            in_head = name.startswith("lm_head") and head is None and not tied
            if name.endswith("proj.weight") or in_head:
                value.copy_(decoded(value, "int8" if in_head else kind))
        with offload(folder, device="cpu", cpu_memory=budget, **options) as session:
            poison_homes(session)
            assert torch.equal(session.model(TOKENS).logits, model(TOKENS).logits)
            text = session.model.generate(TOKENS, max_new_tokens=6, do_sample=False)
            assert torch.equal(text, model.generate(TOKENS, max_new_tokens=6, do_sample=False))
            assert session.report().exactness.startswith(f"lossy: {kind} weights")
            assert bool(session.plan.weights.streamed) == (budget == "2700KiB")
            if budget == "2700KiB":
                layers = session.plan.weights.streamed
                numbers = sum(value.numel() for key in layers for value in session.model.get_submodule(key).parameters())
                plain_head = 2 * 96 * 256 if head or tied else 0
                assert moved_in_a_pass(session, TOKENS) <= (1.1 if kind == "int8" else 0.7) * numbers + plain_head + 8192
    # The session is over, and its file had no name: the values are there all the same. The others' homes are poisoned.
    state = session.model.state_dict()
    for name, value in model.state_dict().items():
        encoded = name.endswith("proj.weight") or (name.startswith("lm_head") and not head and not tied)
        assert not encoded or torch.equal(state[name], value), name
        assert torch.equal(value, original[name]) == (not encoded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_afterwards_the_model_takes_another_dtype(dtype, tmp_path):
    """The values are read in the dtype that they were stored in, and converted."""
    folder, _ = saved(tmp_path / "model")
    with offload(folder, device="cpu", cpu_memory="4MiB", max_tokens=16, weights="int4") as session:
        pass
    wanted = {name: value.to(dtype) for name, value in copy.deepcopy(session.model).state_dict().items()}
    for name, value in session.model.to(dtype).state_dict().items():
        assert torch.equal(value, wanted[name]), name
    assert not session.model(TOKENS).logits.isnan().any()


def test_afterwards_the_model_is_pickled(tmp_path):
    folder, _ = saved(tmp_path / "model")
    kept = tmp_path / "kept"
    kept.mkdir()
    options = {"weights": "int4", "disk_dir": str(kept)}
    with torch.no_grad(), offload(folder, device="cpu", cpu_memory="4MiB", max_tokens=16, **options) as session:
        wanted = session.model(TOKENS[:1]).logits
    again = pickle.loads(pickle.dumps(session.model))
    with torch.no_grad():
        assert torch.equal(again(TOKENS[:1]).logits, wanted)
        assert torch.equal(session.model(TOKENS[:1]).logits, wanted)


def test_a_tied_head_is_not_said_to_be_encoded(tmp_path):
    folder, _ = saved(tmp_path / "model", tie_word_embeddings=True)
    with offload(folder, device="cpu", cpu_memory="4MiB", max_tokens=16, weights="int4") as session:
        assert session.report().exactness == "lossy: int4 weights, groups of 64"
    with pytest.raises(ConfigError, match="has nothing to encode"):
        offload(folder, device="cpu", cpu_memory="4MiB", weights_head="nf4").__enter__()


def test_it_is_encoded_once(tmp_path):
    folder, _ = saved(tmp_path / "model")
    kept = tmp_path / "kept"
    kept.mkdir()
    logits, said = [], []
    for kind in ("int4", "int4", "nf4"):
        told = []
        options = {
            "disk_dir": str(kept),
            "weights": kind,
            "max_tokens": 16,
            "progress": lambda what, done, total, told=told: told.append(what),
        }
        with torch.no_grad(), offload(folder, device="cpu", cpu_memory="3MiB", **options) as session:
            logits.append(session.model(TOKENS[:1]).logits)
            assert not any("encoded at each start" in note for note in session.report().fallbacks)
        said.append("encoding" in told)
    assert said == [True, False, True]
    assert torch.equal(logits[0], logits[1])
    assert len(list(kept.iterdir())) == 2


def test_adapters_are_trained_on_encoded_weights(tmp_path):
    """QLoRA: the losses are those on the plain model with the decoded weights, bit by bit."""
    peft = pytest.importorskip("peft")
    folder, model = saved(tmp_path / "model", pad_token_id=0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("proj.weight", "lm_head.weight")):
                value.copy_(decoded(value, "nf4"))
    losses = []
    with offload(
        folder,
        device="cpu",
        cpu_memory="6MiB",
        training=Training(),
        batch_size=2,
        max_tokens=8,
        weights="nf4",
        weights_head="nf4",
    ) as session:
        for trained in (session.model, copy.deepcopy(model)):
            torch.manual_seed(1)
            adapted = peft.get_peft_model(trained, peft.LoraConfig(r=4, target_modules="all-linear"))
            optimizer = torch.optim.AdamW([value for value in adapted.parameters() if value.requires_grad], lr=1e-2)
            mine = []
            for _ in range(4):
                loss = adapted(TOKENS, labels=TOKENS).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                mine.append(loss.item())
            losses.append(mine)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_the_plan_of_what_is_not_encoded_yet(tmp_path, capsys):
    folder, _ = saved(tmp_path / "model")
    options = ["--device", "cpu", "--cpu-memory", "3MiB", "--weights", "int4", "--prompt-tokens", "8", "--new-tokens", "8"]
    assert main(["plan", folder, *options, "--output", str(tmp_path / "plan.json")]) == 0
    assert "streamed" in capsys.readouterr().out
    with offload(
        folder, device="cpu", cpu_memory="3MiB", weights="int4", max_tokens=16, plan=tmp_path / "plan.json"
    ) as session:
        assert session.plan.weights.streamed


def test_the_plan_says_what_encoding_would_give_where_it_can_be_done(tmp_path, capsys):
    plain, mixture = saved(tmp_path / "model")[0], saved(tmp_path / "mixture", hf.MixtralConfig, num_local_experts=4)[0]
    said = {}
    for folder in (plain, mixture):
        assert (
            main(
                [
                    "plan",
                    folder,
                    "--device",
                    "cpu",
                    "--cpu-memory",
                    "6MiB",
                    "--new-tokens",
                    "8",
                    "--prompt-tokens",
                    "8",
                    "--json",
                ]
            )
            == 0
        )
        said[folder] = {item["change"] for item in json.loads(capsys.readouterr().out)["what_if"]}
    assert {f"weights {kind} (lossy)" for kind in KINDS} <= said[plain]
    assert not any(change.startswith("weights") for change in said[mixture])


def test_what_cannot_be_encoded_is_named(tmp_path):
    folder, _ = saved(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"weights='int3' is not known; give as-is, int8, int4 or nf4"):
        offload(folder, device="cpu", weights="int3").__enter__()
    with pytest.raises(ConfigError, match=r"cannot be given: a quantised checkpoint .* weights='int8'"):
        offload(folder, device="cpu", load_in_4bit=True).__enter__()
    with pytest.raises(ConfigError, match="adapters can be trained"):
        offload(folder, device="cpu", weights="int4", training=Training(full=True)).__enter__()
    mixture, _ = saved(tmp_path / "mixture", hf.MixtralConfig, num_local_experts=4)
    with pytest.raises(ConfigError, match=r"is converted when it is loaded; leave weights= out"):
        offload(mixture, device="cpu", weights="int4", cpu_memory="64MiB").__enter__()
    config = Path(folder, "config.json")
    config.write_text(config.read_text().replace("{", '{"quantization_config": {"quant_method": "fp8"},', 1))
    with pytest.raises(ConfigError, match="is quantised already"):
        offload(folder, device="cpu", weights="int4").__enter__()


def test_words():
    assert str(Encoding("int8", "int8")) == "int8 weights, a scale a row"
    assert str(Encoding("int4", "int8")) == "int4 weights, groups of 64; the head in int8"
    assert str(Encoding("as-is", "int8")) == "the head in int8"
