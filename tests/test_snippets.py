"""Every command and every Python block of the README and of the documents runs.

As written, but for what a test cannot have: a model of the hub, a GPU, gigabytes, a folder of its own. What one line of a page
writes, the next ones read.
"""

import ast
import io
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from offload.cli.main import main
from offload.model.checkpoint_folder import find_folder
from offload.synth import synthesize
from tests.snippets import PAGES, ROOT, blocks, commands, expanded

TEXT = "In the beginning was the word, and the king said unto him, Speak. "
WITH_COMMANDS = [page for page in PAGES if commands(page)]
WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A small mixture of experts, for `org/moe-model`."""
    folder = tmp_path_factory.mktemp("mixture") / "model"
    synthesize(str(folder), 8_000_000, family="qwen3_moe")
    return str(folder)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with the files that the documents name, which is the current one."""
    (tmp_path / "questions.jsonl").write_text('"Who was"\n{"prompt": "And the"}\n')
    (tmp_path / "lines.jsonl").write_text('{"text": "And the king of the sea said unto the whale, Sing."}\n' * 2)
    (tmp_path / "book.txt").write_text(TEXT * 12)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "book.txt").write_text(TEXT * 4)
    shutil.copy(ROOT / "tests" / "described_machine.json", tmp_path / "that-machine.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def on_this_machine(arguments, folder, mixture):
    """The arguments of a command with what there is here in the place of what it names."""
    names = {"org/model": "demo", "50": "1", "org/moe-model": mixture, "/tmp/model": str(folder / "model"), "4GiB": "40MiB"}
    command, *rest = [names.get(item, item) for item in arguments]
    if command in ("generate", "plan", "finetune") and "--gpu-memory" in rest:
        place = rest.index("--gpu-memory")
        del rest[place : place + 2]
    if command in ("generate", "plan", "finetune", "probe"):
        rest += ["--device", "cpu"]
    if command == "generate" and mixture in rest:
        rest += ["--cpu-memory", "7MiB"]
    if command == "generate" and "--max-new-tokens" not in rest:
        rest += ["--max-new-tokens", "5"]
    return [command, *rest]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page, desk, mixture, monkeypatch, capsys):
    for line in commands(page):
        arguments, given, target = expanded(line, desk)
        if "--output" in arguments and "--resume" not in arguments:
            shutil.rmtree(desk / arguments[arguments.index("--output") + 1], ignore_errors=True)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
        assert main(on_this_machine(arguments, desk, mixture)) == 0, f"{line}\n{capsys.readouterr().err}"
        said = capsys.readouterr()
        if target is not None:
            (desk / target).write_text(said.out)
    for answers in desk.glob("answers.json"):
        assert len(json.loads(answers.read_text())["completions"]) == 2
    for answers in desk.glob("answers.jsonl"):
        assert [json.loads(line)["new_tokens"] for line in answers.read_text().splitlines()] == [5, 5]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, desk):
    folder = find_folder("demo")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = dict(tokenizer([TEXT] * (32 if page.stem == "kv" else 1), return_tensors="pt"))
    batch = {"input_ids": torch.arange(3, 19).view(2, 8), "labels": torch.arange(3, 19).view(2, 8)}
    names = {
        "torch": torch,
        "tokenizer": tokenizer,
        "inputs": inputs,
        "model": AutoModelForCausalLM.from_pretrained(folder),
        "system_prompt": "In the beginning was the word",
        "data": [[batch, batch]],
    }
    for block in blocks(page, "python"):
        for there, here in (
            ('"org/model"', repr(folder)),
            ('gpu_memory="8GiB"', 'device="cpu"'),
            ('"gpu_memory": "8GiB"', '"device": "cpu"'),
            ("/fast/disk", str(desk)),
            ("max_tokens=100_000", "max_tokens=200"),
        ):
            block = block.replace(there, here)
        if page.stem == "kv" and "shared_prefix" not in block:
            names["inputs"] = {name: value[:1] for name, value in inputs.items()}
        exec(compile(block, page.name, "exec"), names)
        names["inputs"] = inputs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_lines_are_short(page):
    long = [line for line in page.read_text().splitlines() if len(line) > 120 and not line.startswith(("|", "!["))]
    assert not long


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("notebook", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, desk):
    """Cell by cell, and what a cell ends with is shown as a notebook would."""
    names = {"__name__": "notebook"}
    for cell in json.loads(notebook.read_text())["cells"]:
        assert not cell.get("outputs"), "what a run printed is not kept"
        if cell["cell_type"] == "code":
            *before, last = ast.parse("".join(cell["source"])).body
            exec(compile(ast.Module(before, []), notebook.name, "exec"), names)
            if isinstance(last, ast.Expr):
                shown = eval(compile(ast.Expression(last.value), notebook.name, "eval"), names)
                assert not hasattr(shown, "_repr_html_") or shown._repr_html_().startswith("<p")
            else:
                exec(compile(ast.Module([last], []), notebook.name, "exec"), names)
