"""Within memory, for real: a control group that kills what holds more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.memory_group import MemoryGroup, available, evict
from offload.synth import synthesize

MIB = 1 << 20
ROOT = Path(__file__).parent.parent.parent

needs_groups = pytest.mark.skipif(not available(), reason="control groups cannot be made here (needs root)")


def generate(folder, limit_bytes, *arguments):
    evict(str(folder))
    command = [sys.executable, "-m", "offload.cli.main", "generate", str(folder), "--prompt", "Hello there", "--json"]
    command += ["--device", "cpu", "--max-new-tokens", "4", *arguments]
    with MemoryGroup(limit_bytes) as group:
        return group.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_groups
def test_a_model_of_2_2_gb_in_1500_mib(tmp_path):
    synthesize(str(tmp_path / "model"), 2_200_000_000)
    done, peak = generate(tmp_path / "model", 1500 * MIB, "--cpu-memory", "1000MiB")
    assert done.returncode == 0, done.stderr
    assert peak <= 1400 * MIB
    report = json.loads(done.stdout)["report"]
    assert report["tiers"]["cpu"]["peak_bytes"] <= 1000 * MIB
    assert report["streamed_bytes_per_pass"] > 1000 * MIB


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_groups
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_loading_stays_within_the_budget(family, tmp_path):
    """Also where transformers' converters merge the experts of the whole model, without a folder to keep them."""
    synthesize(str(tmp_path / "model"), 700_000_000, family=family)
    done, peak = generate(tmp_path / "model", 600 * MIB, "--cpu-memory", "150MiB")
    assert done.returncode == 0, done.stderr
    assert peak <= 550 * MIB


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_groups
def test_the_default_budget_obeys_the_control_group(tmp_path):
    synthesize(str(tmp_path / "model"), 500_000_000)
    done, peak = generate(tmp_path / "model", 800 * MIB)
    assert done.returncode == 0, done.stderr
    assert peak <= 800 * MIB
    assert json.loads(done.stdout)["report"]["tiers"]["cpu"]["budget_bytes"] < 500 * MIB


IMPORTED_BY_ENTERING = """
import json, sys, torch
from offload import offload
assert "transformers" not in sys.modules
with offload("demo", device="cpu", cpu_memory="8MiB", max_tokens=64) as session:
    session.model(torch.arange(3, 20)[None])
    report = session.report()
print(json.dumps([report.peak.measured_bytes, report.peak.predicted_bytes, report.fallbacks, report.tiers["cpu"].unaccounted_bytes]))
"""


def test_code_that_entering_imports_is_no_memory_of_the_session():
    done = subprocess.run([sys.executable, "-c", IMPORTED_BY_ENTERING], capture_output=True, text=True, check=True, cwd=ROOT)
    measured, predicted, fallbacks, unaccounted = json.loads(done.stdout.splitlines()[-1])
    assert fallbacks == []
    assert measured < predicted + 40 * MIB
    assert unaccounted < 40 * MIB
