"""What the documents say is what is there."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = [
    pytest.param(path, marks=[pytest.mark.slow] if path.name.startswith("teach_") else [])
    for path in sorted((ROOT / "examples").glob("*.py"))
    if not path.name.startswith("train_")
]


def run(command, folder, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(example, tmp_path):
    assert run([sys.executable, str(example)], tmp_path).strip()


def test_the_example_with_your_own_module_is_identical(tmp_path):
    out = run([sys.executable, str(ROOT / "examples/offload_your_own_module.py")], tmp_path)
    assert "identical: True and afterwards: True" in out
    assert "streamed from disk" in out


def test_the_readme_names_the_two_commands():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in ("demo", "test"):
        assert f"make {target}" in README
        assert target in targets


def test_every_key_of_the_report_is_documented():
    from offload import offload

    text = (ROOT / "docs/report.md").read_text()
    with offload("demo", device="cpu", cpu_memory="8MiB", max_tokens=32) as session:
        report = session.report().to_dict()
    for key in report:
        assert f"`{key}" in text or f", `{key}`" in text, key
    for wanted in ("budget_bytes", "peak_bytes"):
        assert all(wanted in tier for tier in report["tiers"].values())
    assert set(report["tiers"]) == {"gpu", "cpu", "nvme"}
    for wanted in ("bytes", "seconds", "bytes_per_second"):
        assert wanted in report["links"]["disk"]
    assert "seconds" in report["prefill"]
    assert "seconds_per_token" in report["decode"]
    assert {"exactness", "process_bytes", "peak_rss_bytes", "fallbacks"} <= set(report)


def test_links_in_documents_lead_somewhere():
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            base = document.parent / target
            assert base.exists() or (base.with_suffix(".md")).exists(), f"{document.name}: {target}"


def test_the_demo_model_is_small():
    size = sum(path.stat().st_size for path in (ROOT / "offload/demo").iterdir() if path.suffix == ".safetensors")
    assert size <= 12_000_000
    config = json.loads((ROOT / "offload/demo/config.json").read_text())
    assert 6 <= config["num_hidden_layers"] <= 8
    assert config["dtype"] == "bfloat16"


def test_the_figures_of_cards_are_those_of_the_results():
    from benchmarks.verified import PAGE, filled

    page = PAGE.read_text()
    assert filled(page) == page, "run `python -m benchmarks.verified`"


def test_a_run_on_a_card_is_taken_over(tmp_path, monkeypatch):
    from benchmarks import verified

    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(verified, "RESULTS", results)
    decode = {"seconds_per_token": 0.05, "link_share": 0.97, "predicted_seconds_per_token_error": 0.1, "peak_error": 0.01}
    run = {"card": "NVIDIA GeForce RTX 4090", "date": "2027-01-02", "commit": "abc1234", "request": {"size": "12GB"}}
    (tmp_path / "gpu.json").write_text(json.dumps(run | {"median": {"from CPU memory": decode}}))
    (tmp_path / "kv-gpu.json").write_text(json.dumps({"median": {"identical": 0.2, "rounding": 0.3, "resident": 0.01}}))
    (tmp_path / "tests.txt").write_text("....\n236 passed, 22 skipped in 70.1s\n")
    (tmp_path / "machine.txt").write_text("a machine\n")
    verified.keep(tmp_path)
    table = verified.table()
    assert "| from CPU memory, 12GB | GeForce RTX 4090, 2027-01-02, abc1234 | 50.0 ms a token, 0.97 of the link" in table
    assert "| 236 passed, 22 skipped |" in table
    assert "put together 200.0 ms" in table
    assert (results / "gpu-geforce-rtx-4090-machine.txt").exists()


def messages():
    """What stands in quotes in the first column of the page, piece by piece."""
    rows = [line.split("|")[1] for line in (ROOT / "docs/troubleshooting.md").read_text().splitlines() if line.startswith("| ")]
    return [piece for row in rows for piece in re.findall(r'"([^"]+)"', row)]


def said_by_the_code():
    """Every string of the sources, with a mark where a value goes."""
    found = []
    for path in (path for room in ("offload", "scheduler", "storage") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_messages_of_the_troubleshooting_are_those_of_the_code():
    text, pieces = said_by_the_code(), messages()
    assert len(pieces) >= 8
    assert [piece for piece in pieces if piece not in text] == []


def test_the_errors_of_the_troubleshooting_are_there():
    from offload import errors

    page = (ROOT / "docs/troubleshooting.md").read_text()
    named = set(re.findall(r"`([A-Z]\w+)`", page)) & {name for name in dir(errors) if name[0].isupper()}
    inner = {"OffloadError", "ConfigError", "CheckpointError", "SessionError", "TrainingError", "PlatformError"}
    assert named >= set(errors.__all__) - inner


def test_every_page_is_in_the_index():
    listed = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f": {page.name}" not in listed] == []
