"""Training that is killed at random moments goes on as if nothing had been."""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
from safetensors.torch import load_file

KILLS = 10
SENTENCE = "And the king of the sea said unto the whale, Sing."


def finetune(arguments, log):
    """In a process of its own, which may be killed at any moment."""
    import sys

    from offload.cli.main import main

    sys.stderr = open(log, "a")  # noqa: SIM115
    os._exit(main(arguments))


@pytest.fixture(scope="module")
def processes():
    """New processes in a moment: they are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "transformers", "peft", "offload.cli.main", "transformers.models.llama.modeling_llama"]
    )
    return context


def wait_for_change(path, process):
    """Until a checkpoint was written."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    while process.exitcode is None and (path.stat().st_mtime_ns if path.exists() else 0) == before:
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_killed_at_random_moments(method, processes, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"{SENTENCE} {number}"}) for number in range(12)))
    arguments = ["finetune", "demo", "--data", str(data), "--device", "cpu", "--cpu-memory", "96MiB", "--method", method]
    arguments += ["--dropout", "0.1", "--epochs", "12", "--batch-size", "2", "--gradient-accumulation", "2", "--seed", "3"]
    arguments += ["--state-tier", "nvme" if method == "full" else "cpu", "--learning-rate", "1e-3"]
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    log = tmp_path / "log"

    def start(output, *more):
        process = processes.Process(target=finetune, args=([*arguments, "--output", str(tmp_path / output), *more], str(log)))
        process.start()
        return process

    whole = start("whole")
    whole.join()
    assert whole.exitcode == 0, log.read_text()
    chance = random.Random(11)
    manifest = tmp_path / "killed" / "checkpoint" / "training.json"
    kills = 0
    while True:
        process = start("killed", "--save-every", "1", "--resume")
        if kills < KILLS:
            # Now and then before the first step; else at any moment after one, which is mostly in the middle of another.
            if chance.random() < 0.8:
                wait_for_change(manifest, process)
            process.join(chance.uniform(0, 0.3))
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, log.read_text()
    assert kills == KILLS
    ours, wanted = load_file(tmp_path / "killed" / name), load_file(tmp_path / "whole" / name)
    assert ours.keys() == wanted.keys()
    assert all((ours[key] == wanted[key]).all() for key in wanted)
    # Nothing is left of those that were killed but the one checkpoint.
    assert len(list((tmp_path / "killed" / "checkpoint").glob("*.bin"))) == 1
