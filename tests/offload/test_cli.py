"""The commands, as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from offload.cli.main import main
from offload.storage.checkpoint import read_checkpoint
from offload.synth import FAMILIES, synthesize

BUDGET = "6MiB"


def run(capsys, *arguments):
    status = main([*arguments])
    output = capsys.readouterr()
    return status, output.out, output.err


@pytest.fixture(scope="module")
def plain():
    """The demo model without us: a function from a prompt to its continuation."""
    from offload.model.checkpoint_folder import find_folder

    folder = find_folder("demo")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)

    def complete(prompt, count):
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=count, do_sample=False)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return complete


def test_generates_what_the_plain_model_does(capsys, plain):
    status, out, err = run(
        capsys,
        "generate",
        "demo",
        "--prompt",
        "And the king",
        "--max-new-tokens",
        "24",
        "--device",
        "cpu",
        "--cpu-memory",
        BUDGET,
        "--verbose",
    )
    assert status == 0
    assert out.strip() == plain("And the king", 24).strip()
    assert "exactness identical" in err
    assert "streamed from disk" in err


def test_one_json_object(capsys, tmp_path, plain):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "And the king"}\n"In the beginning"\n\n')
    report = tmp_path / "report.json"
    status, out, err = run(
        capsys, "generate", "demo", "--prompts", str(prompts), "--max-new-tokens", "12", "--device", "cpu",
        "--cpu-memory", BUDGET, "--json", "--report", str(report),
    )  # fmt: skip
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert [item["text"] for item in result["completions"]] == [
        plain(text, 12) for text in ("And the king", "In the beginning")
    ]
    assert json.loads(report.read_text())["exactness"] == "identical"
    links = result["report"]["links"]
    assert links["disk"]["bytes"] > 0


def test_a_batch_gives_every_prompt_its_own_text(capsys, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"And the king"\n"In the beginning God"\n"Blessed"\n')
    status, out, _ = run(
        capsys, "generate", "demo", "--prompts", str(prompts), "--batch-size", "2", "--max-new-tokens", "5", "--device", "cpu", "--json"
    )  # fmt: skip
    assert status == 0
    assert [item["prompt"] for item in json.loads(out)["completions"]] == ["And the king", "In the beginning God", "Blessed"]


def test_a_seed_makes_draws_repeatable(capsys):
    call = [
        "generate",
        "demo",
        "--prompt",
        "And",
        "--max-new-tokens",
        "12",
        "--temperature",
        "1",
        "--top-p",
        "0.9",
        "--device",
        "cpu",
    ]
    first, second, other = (run(capsys, *call, "--seed", seed)[1] for seed in ("1", "1", "2"))
    assert first == second
    assert first != other


def test_standard_input_and_a_closed_pipe(tmp_path):
    command = [
        sys.executable,
        "-m",
        "offload.cli.main",
        "generate",
        "demo",
        "--max-new-tokens",
        "8",
        "--device",
        "cpu",
        "--quiet",
    ]
    done = subprocess.run(command, input="And the king\n", capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stderr == ""
    assert done.stdout.strip()
    shell = f"echo And | {' '.join(command)} --max-new-tokens 300 | head -c 5"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", shell], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_on_a_terminal_the_progress_bar_does_not_tear_the_text(plain):
    import pty

    leader, follower = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "offload.cli.main",
        "generate",
        "demo",
        "--prompt",
        "And the king",
        "--max-new-tokens",
        "24",
    ]
    process = subprocess.Popen([*command, "--device", "cpu", "--cpu-memory", BUDGET], stdout=follower, stderr=follower)
    os.close(follower)
    seen = b""
    while True:
        try:
            seen += os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
    os.close(leader)
    assert process.wait() == 0
    text = seen.decode().replace("\r\n", "\n")
    assert "loading" in text
    assert plain("And the king", 24) in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--chat"], "no chat template"),
        (["--prompt", "x", "--max-new-tokens", "0"], "must be at least 1"),
        (["--prompt", "x", "--batch-size", "0"], "must be at least 1"),
        (["--prompt", "x", "--top-p", "2"], "at most 1"),
        (["--prompt", "x", "--temperature", "-1"], "must be 0 or a positive"),
        (["--prompt", "x", "--temperature", "nan"], "must be 0 or a positive"),
        (["--prompt", "x", "--top-p", "0.5"], "says nothing at temperature 0"),
        (["--prompt", "x", "--seed", "99999999999999999999"], "below 2^63"),
        (["--prompt", "x", "--report", "/no/such/report.json"], "cannot be written"),
        (["--prompt", ""], "has no tokens"),
        (["--prompts", "/no/such/file"], "cannot be read"),
        (["--prompt", "x", "--cpu-memory", "1KiB", "--device", "cpu"], "needs at least"),
        (["--prompt", "x", "--disk", "/no/such/folder", "--device", "cpu"], "does not exist"),
        (["--prompt", "x", "--device", "cpu", "--gpu-memory", "1GiB"], "give --cpu-memory only"),
    ],
)
def test_a_wrong_call_gets_one_plain_line(capsys, arguments, message):
    status, out, err = run(capsys, "generate", "demo", *arguments)
    assert status == 1
    assert out == ""
    assert message in err
    assert err.startswith("offload: ")
    assert err.count("\n") == 1


def test_text_that_is_not_utf8_is_refused(capsys, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(b'"\xff"')
    status, _, err = run(capsys, "generate", "demo", "--prompts", str(prompts))
    assert status == 1
    assert "not UTF-8" in err


def test_output_that_cannot_be_written_is_one_plain_line():
    command = [
        sys.executable,
        "-m",
        "offload.cli.main",
        "generate",
        "demo",
        "--prompt",
        "a",
        "--max-new-tokens",
        "2",
        "--quiet",
    ]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("offload: ")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("line", ["{not json", '{"text": "x"}', "17"])
def test_a_bad_line_is_named(capsys, tmp_path, line):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"fine"\n' + line + "\n")
    status, _, err = run(capsys, "generate", "demo", "--prompts", str(prompts))
    assert status == 1
    assert "line 2" in err


def test_chat_uses_the_template(tmp_path, capsys):
    import shutil

    from offload.model.checkpoint_folder import find_folder

    shutil.copytree(find_folder("demo"), tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} said{% endfor %}")
    call = ["--max-new-tokens", "6", "--device", "cpu", "--json"]
    _, chat, _ = run(capsys, "generate", str(tmp_path / "chat"), "--prompt", "And the king", "--chat", *call)
    _, text, _ = run(capsys, "generate", "demo", "--prompt", "And the king said", *call)
    assert json.loads(chat)["completions"][0]["text"] == json.loads(text)["completions"][0]["text"]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_synth_writes_what_transformers_loads(family, tmp_path, capsys):
    folder = tmp_path / family
    status, _, err = run(capsys, "synth", str(folder), "--size", "24MB", "--family", family, "--shard-size", "7MB")
    assert status == 0
    assert family in err
    stored = read_checkpoint(str(folder))
    total = sum(item.spec.nbytes for item in stored.values())
    assert abs(total - 24_000_000) < 0.08 * 24_000_000
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert all(path.stat().st_size < 8_000_000 for path in folder.glob("*.safetensors"))
    model, problems = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not problems["missing_keys"]
    assert not problems["unexpected_keys"]
    logits = model(input_ids=torch.arange(8)[None]).logits
    assert logits.isfinite().all()
    assert logits.std() > 1e-3
    layers = [layer.self_attn.q_proj.weight for layer in model.model.layers]
    assert not any(torch.equal(layers[0], other) for other in layers[1:])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size


def test_synth_is_repeatable_and_refuses_what_cannot_be(tmp_path, capsys):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synthesize(str(tmp_path / name), 20_000_000, seed=seed)
    contents = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]
    assert "is not empty" in run(capsys, "synth", str(tmp_path / "a"), "--size", "20MB")[2]
    assert "too small" in run(capsys, "synth", str(tmp_path / "d"), "--size", "1KB")[2]
    assert "free" in run(capsys, "synth", str(tmp_path / "e"), "--size", "900TiB")[2]
    assert "cannot be made" in run(capsys, "synth", os.devnull + "/x", "--size", "20MB")[2]


def test_help_tells_every_option(capsys):
    for command in ("generate", "synth"):
        assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--prompt", "--prompts", "--max-new-tokens", "--device", "--gpu-memory", "--cpu-memory", "--disk", "--batch-size",
                   "--dtype", "--revision", "--trust-remote-code", "--temperature", "--top-p", "--seed", "--chat", "--report", "--json",
                   "--size", "--family"):  # fmt: skip
        assert option in text


def test_prompts_end_at_line_feeds_only(capsys, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes('\ufeff"And the king\u2028said"\r\n{"prompt": "In the\u0085beginning"}\n \t\r\n'.encode())
    status, out, err = run(
        capsys, "generate", "demo", "--prompts", str(prompts), "--max-new-tokens", "2", "--device", "cpu", "--json"
    )
    assert status == 0, err
    assert [item["prompt"] for item in json.loads(out)["completions"]] == ["And the king\u2028said", "In the\u0085beginning"]
