"""Training that is killed at random moments goes on as if nothing had been."""

import json
import os
import random
import shutil
import signal
import time

import pytest
from safetensors.torch import load_file

from offload import offload
from tests import processes
from tests.architectures import make, tokens

KILLS = int(os.environ.get("KILLS", "2"))
"""Each time; the environment may ask for more."""
SENTENCE = "And the king of the sea said unto the whale, Sing."


def finetune(arguments, log):
    """In a process of its own, which may be killed at any moment."""
    import sys

    from offload.cli.main import main

    sys.stderr = open(log, "a")  # noqa: SIM115
    os._exit(main(arguments))


def wait_for_change(path, process):
    """Until a checkpoint was written."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    while process.exitcode is None and (path.stat().st_mtime_ns if path.exists() else 0) == before:
        time.sleep(0.002)


def arguments_of(method, data):
    found = ["finetune", "demo", "--data", str(data), "--device", "cpu", "--cpu-memory", "96MiB", "--method", method]
    found += [
        "--dropout",
        "0.1",
        "--epochs",
        str(6 + KILLS),
        "--batch-size",
        "2",
        "--gradient-accumulation",
        "2",
        "--seed",
        "3",
    ]
    return [*found, "--state-tier", "nvme" if method == "full" else "cpu", "--learning-rate", "1e-3"]


class Runs:
    """Trainings of one kind, each in a process of its own."""

    def __init__(self, method, folder):
        data = folder / "data.jsonl"
        data.write_text("\n".join(json.dumps({"text": f"{SENTENCE} {number}"}) for number in range(12)))
        self._arguments = arguments_of(method, data)
        self._context = processes.context()
        self._log = folder / "log"
        self._chance = random.Random(11)

    def start(self, output, *more):
        arguments = [*self._arguments, "--output", str(output), *more]
        process = self._context.Process(target=finetune, args=(arguments, str(self._log)))
        process.start()
        return process

    def whole(self, output):
        process = self.start(output)
        process.join()
        assert process.exitcode == 0, self._log.read_text()

    def killed(self, output, kills):
        """Killed so many times at any moment; the last one ends."""
        manifest = output / "checkpoint" / "training.json"
        for _ in range(kills):
            process = self.start(output, "--save-every", "1", "--resume")
            # Now and then before the first step; else at any moment after one, which is mostly in the middle of another.
            if self._chance.random() < 0.8:
                wait_for_change(manifest, process)
            process.join(self._chance.uniform(0, 0.3))
            assert process.exitcode is None, "too few steps for so many kills"
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL, self._log.read_text()

    def gone_on(self, output):
        process = self.start(output, "--save-every", "1", "--resume")
        process.join()
        assert process.exitcode == 0, self._log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_killed_at_random_moments(method, tmp_path):
    """In its own folder, then in a copy of it, which is no danger to the first one, then in the first one again."""
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    runs, killed, copy = Runs(method, tmp_path), tmp_path / "killed", tmp_path / "copy"
    runs.whole(tmp_path / "whole")
    wanted = load_file(tmp_path / "whole" / name)
    runs.killed(killed, KILLS)
    shutil.copytree(killed, copy)
    before = contents(killed)
    runs.killed(copy, KILLS)
    assert contents(killed) == before
    for folder in (copy, killed):
        runs.gone_on(folder)
        ours = load_file(folder / name)
        assert ours.keys() == wanted.keys()
        assert all((ours[key] == wanted[key]).all() for key in wanted)
        # Nothing is left of those that were killed but the one checkpoint.
        assert len(list((folder / "checkpoint").iterdir())) == 2


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def convert(folder, disk):
    with offload(folder, device="cpu", cpu_memory="64MiB", max_tokens=16, disk_dir=disk, expert_policy="layers") as session:
        session.model(input_ids=tokens())
    os._exit(0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_while_weights_are_converted(tmp_path):
    make("mixtral", True).save_pretrained(tmp_path / "model")
    disk = tmp_path / "disk"
    disk.mkdir()
    others = {"film.partial": b"a", "0123456789abcdef0123456789abcdef.partial": b"b", "x.offload-partial": b"c"}
    for name, content in others.items():
        (disk / name).write_bytes(content)
    chance, ended = random.Random(5), 0
    for _ in range(KILLS):
        process = processes.context().Process(target=convert, args=(str(tmp_path / "model"), str(disk)))
        process.start()
        process.join(chance.uniform(0.05, 0.6))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        ended += process.exitcode == 0
        for path in disk.glob("*.blocks"):
            # Converted again next time.
            path.unlink()
    process = processes.context().Process(target=convert, args=(str(tmp_path / "model"), str(disk)))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert ended < KILLS
    assert {name: (disk / name).read_bytes() for name in others} == others
    # What the killed ones left is gone.
    assert len(os.listdir(disk)) == len(others) + 1
