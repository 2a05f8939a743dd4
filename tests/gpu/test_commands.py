"""The commands with `--device cuda`: the text that the plain model gives there, and the weights that the CPU gives."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import offload.demo
from offload.cli.main import main
from offload.config import parse_bytes
from offload.storage.devices.resolve import resolve_device
from offload.synth import synthesize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

PROMPT = ["--prompt", "And the king said", "--max-new-tokens"]
ON = {"cpu": ["--device", "cpu", "--cpu-memory", "512MiB"], "cuda": ["--device", "cuda", "--cpu-memory", "512MiB"]}


def run(capsys, *arguments):
    """Budgets of device memory are beside what the card's libraries take."""
    given = list(arguments)
    if "--gpu-memory" in given:
        at = given.index("--gpu-memory") + 1
        given[at] = str(parse_bytes(given[at]) + resolve_device("cuda").workspace_bytes)
    status = main(given)
    out, err = capsys.readouterr()
    assert status == 0, err
    return out, err


WAYS = {
    "all of it": [],
    "from CPU memory": ["--gpu-memory", "3MiB"],
    "KV on three tiers": ["--gpu-memory", "6MiB", "--kv-memory", "512KiB", "--cpu-memory", "14MiB"],
}


def plain_text(new_tokens):
    """What transformers gives on the card: a CPU rounds otherwise, and two tokens may be as likely."""
    folder = Path(offload.demo.__file__).parent
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().to("cuda")
    ids = tokenizer(PROMPT[1], return_tensors="pt").input_ids.to("cuda")
    with torch.inference_mode():
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("way", list(WAYS))
def test_generate(way, capsys, tmp_path):
    new_tokens = 200 if way == "KV on three tiers" else 16
    wanted, report = plain_text(new_tokens), tmp_path / "report.json"
    prompt = [*PROMPT, str(new_tokens)]
    on_card, told = run(capsys, "generate", "demo", *prompt, *ON["cuda"], *WAYS[way], "--report", str(report))
    assert on_card.strip() == wanted.strip()
    assert "exactness identical" in told
    found = json.loads(report.read_text())
    assert found["device"] == "cuda:0"
    assert bool(found["blocks"]["streamed_from_cpu_memory"]) == (way != "all of it")
    assert bool(found["kv"].get("onloaded_bytes")) == (way == "KV on three tiers")


def test_a_mixture(capsys, tmp_path):
    folder = str(tmp_path / "mixture")
    synthesize(folder, 24 << 20, family="qwen3_moe")
    on_cpu, _ = run(capsys, "generate", folder, *PROMPT, "16", *ON["cpu"])
    on_card, told = run(capsys, "generate", folder, *PROMPT, "16", *ON["cuda"], "--gpu-memory", "12MiB")
    assert on_card.strip() == on_cpu.strip()
    assert "experts" in told


def test_probe(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("offload.probe._POINT_SECONDS", 0.01)
    monkeypatch.setattr("offload.probe._DISK_BYTES", 64 << 20)
    monkeypatch.delenv("OFFLOAD_HARDWARE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    profile, kept = tmp_path / "machine.json", tmp_path / "disk"
    kept.mkdir()
    out, _ = run(capsys, "probe", "--device", "cuda", "--disk", str(kept), "--output", str(profile))
    assert torch.cuda.get_device_name() in out
    measured = json.loads(profile.read_text())
    assert measured["device"]["matrix_rates"].keys() == {"bfloat16", "float16", "float32"}
    assert measured["h2d"]["bytes_per_second"] > 0
    assert measured["device"]["workspace_bytes"] == resolve_device("cuda").workspace_bytes
    # It plans by what was measured.
    planned = json.loads(run(capsys, "plan", "demo", "--hardware", str(profile), "--gpu-memory", "3MiB", "--json")[0])
    assert planned["prediction"]["seconds_per_token"] > 0


def test_plan(capsys):
    planned = json.loads(run(capsys, "plan", "demo", "--device", "cuda", "--gpu-memory", "3MiB", "--json")[0])
    assert planned["plan"]["weights"]["in_host_memory"]


TUNED = {
    "lora": (["--method", "lora", "--rank", "4", "--optimizer", "sgd", "--learning-rate", "0.1"], "adapter_model.safetensors"),
    "full, states on NVMe": (["--method", "full", "--state-tier", "nvme"], "model.safetensors"),
}


@pytest.mark.parametrize("way", list(TUNED))
def test_finetune(way, capsys, tmp_path):
    """Kernels differ in the last bits."""
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": "And the king of the sea said unto the whale, Sing."}) for _ in range(8)))
    arguments, file = TUNED[way]
    found = {}
    for device in ("cpu", "cuda"):
        output = tmp_path / device
        budget = ["--gpu-memory", "48MiB"] if device == "cuda" else []
        steps = [
            "--max-steps",
            "3",
            "--batch-size",
            "2",
            "--gradient-accumulation",
            "2",
            "--epochs",
            "4",
            "--sequence-length",
            "32",
            "--dtype",
            "float32",
        ]
        target = ["--data", str(data), "--output", str(output), "--disk", str(tmp_path), *steps]
        run(capsys, "finetune", "demo", *target, *ON[device], *budget, *arguments)
        found[device] = load_file(output / file)
    assert found["cpu"].keys() == found["cuda"].keys()
    for name, value in found["cpu"].items():
        assert torch.allclose(value.float(), found["cuda"][name].float(), atol=1e-4), name
