"""Folders of checkpoints: copied, moved, linked, damaged, on another filesystem; and what they take of the disk."""

import errno
import os
import shutil
import stat
import threading

import pytest
import torch

from offload import ConfigError, Training, offload
from offload.storage.state_file import StateFile
from offload.training.optimizer.checkpoint import Checkpoints
from tests.offload.test_full_training import FAST, RESERVE, micro_batches, prepared

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def a_step(session, number):
    for batch in micro_batches(8, 2)[number]:
        session.backward([lambda batch=batch: session.model(**batch).loss])
    session.step(0.5)


def state_of(session):
    session.finish()
    return {name: value.clone() for name, value in session.model.state_dict().items()}


@pytest.mark.parametrize("state_dir", ["of its own", "the run's"])
@pytest.mark.parametrize("tier", ["cpu", "nvme"])
def test_a_copy_is_a_backup_and_a_moved_folder_is_resumed(tier, state_dir, tmp_path):
    model, _ = prepared("llama", True, torch.bfloat16)
    checkpoint = tmp_path / "model"
    model.save_pretrained(checkpoint)
    run = tmp_path / "run"
    run.mkdir()
    states = run if state_dir == "the run's" else tmp_path
    training = Training(full=True, **FAST, state_tier=tier, state_dir=str(states), sub_group_elements=4096)

    def entered():
        return offload(str(checkpoint), device="cpu", cpu_memory="64MiB", training=training, **RESERVE)

    def resumed_and_gone_on(folder):
        with entered() as session:
            assert session.resume(folder) == {"step": 1}
            a_step(session, 1)
            after = state_of(session)
            session.save(folder, {"step": 2})
        return after

    with entered() as session:
        a_step(session, 0)
        session.save(run, {"step": 1})
    copies = [tmp_path / name for name in ("copy", "linked", "moved")]
    shutil.copytree(run, copies[0])
    shutil.copytree(run, copies[1], copy_function=os.link)
    backup = {name: (run / name).read_bytes() for name in os.listdir(run)}
    found = [resumed_and_gone_on(copies[0]), resumed_and_gone_on(copies[1])]
    # What was copied is as it was, whatever became of the copies, those that share the file's bytes too.
    assert {name: (run / name).read_bytes() for name in os.listdir(run)} == backup
    run.rename(copies[2])
    if states == run:
        run.mkdir()
    found.append(resumed_and_gone_on(copies[2]))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(value, found[0][name]) for name, value in other.items())
    assert all(len(os.listdir(folder)) == 2 for folder in copies)


@pytest.mark.parametrize("tier", ["cpu", "nvme"])
def test_the_disk_holds_one_checkpoint_and_the_next(tier, tmp_path):
    model, _ = prepared("llama", True, torch.bfloat16)
    checkpoint = tmp_path / "model"
    model.save_pretrained(checkpoint)
    training = Training(full=True, **FAST, state_tier=tier, state_dir=str(tmp_path), sub_group_elements=4096)
    held = []
    with offload(str(checkpoint), device="cpu", cpu_memory="64MiB", training=training, **RESERVE) as session:
        for number in range(6):
            a_step(session, number)
            session.save(tmp_path / "run", {"step": number})
            session._parts.components["training"]._checkpoints.wait()
            held.append(held_bytes(session._parts.components["training"].streamed_training.layout.nbytes))
        assert (
            session.machine.host.disk_ledger.held_bytes("optimizer state")
            <= 2 * session._parts.components["training"].streamed_training.layout.nbytes
        )
        assert max(held) <= 2 * session._parts.components["training"].streamed_training.layout.nbytes
        assert held[0] > 0
    assert len(os.listdir(tmp_path / "run")) == 2
    # A second training in the same folder leaves the first one's checkpoint until it has its own.
    with offload(str(checkpoint), device="cpu", cpu_memory="64MiB", training=training, **RESERVE) as session:
        a_step(session, 0)
        session.save(tmp_path / "run", {"step": 1})
        with pytest.raises(ConfigError, match="another training"):
            Checkpoints(tmp_path / "run", session._parts.components["training"].streamed_training, {})
    assert len(os.listdir(tmp_path / "run")) == 2


def held_bytes(least):
    """Of files of this process that are as large as a checkpoint, those without a name included."""
    found = {}
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            status = os.fstat(descriptor)
        except OSError:
            # What listed them.
            continue
        if stat.S_ISREG(status.st_mode) and not os.readlink(f"/proc/self/fd/{descriptor}").endswith(".safetensors"):
            found[status.st_ino] = status.st_size
    return sum(size for size in found.values() if size >= least)


def test_on_another_filesystem_checkpoints_are_copies(tmp_path, monkeypatch):
    def refused(*arguments, **more):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    model, _ = prepared("llama", True, torch.bfloat16)
    checkpoint = tmp_path / "model"
    model.save_pretrained(checkpoint)
    training = Training(full=True, **FAST, state_tier="nvme", state_dir=str(tmp_path), sub_group_elements=4096)

    def entered():
        return offload(str(checkpoint), device="cpu", cpu_memory="64MiB", training=training, **RESERVE)

    monkeypatch.setattr(os, "link", refused)
    with entered() as session:
        a_step(session, 0)
        session.save(tmp_path / "run", {"step": 1})
        wanted = state_of(session)
        assert any("each checkpoint is a copy" in sentence for sentence in session.report().fallbacks)
    with entered() as session:
        assert session.resume(tmp_path / "run") == {"step": 1}
        assert all(torch.equal(value, wanted[name]) for name, value in state_of(session).items())


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path, monkeypatch):
    """However late it is written: steps that follow meanwhile are not in it."""
    model, _ = prepared("llama", True, torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    training = Training(full=True, **FAST, sub_group_elements=4096)
    gone_on = threading.Event()
    checksums = StateFile.checksums

    def late(file, nbytes):
        assert gone_on.wait(60)
        return checksums(file, nbytes)

    def entered():
        return offload(str(tmp_path / "model"), device="cpu", cpu_memory="64MiB", training=training, **RESERVE)

    with entered() as session:
        a_step(session, 0)
        progress = {"step": 1, "seen": [0]}
        with monkeypatch.context() as patch:
            patch.setattr(StateFile, "checksums", late)
            session.save(tmp_path / "run", progress)
            wanted = state_of(session)
            progress["seen"].append(1)
            a_step(session, 1)
            after = state_of(session)
            gone_on.set()
            session._parts.components["training"]._checkpoints.wait()
    with entered() as session:
        assert session.resume(tmp_path / "run") == {"step": 1, "seen": [0]}
        assert all(torch.equal(value, wanted[name]) for name, value in state_of(session).items())
        a_step(session, 1)
        assert all(torch.equal(value, after[name]) for name, value in state_of(session).items())


@pytest.mark.parametrize("tier", ["cpu", "nvme"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_and_nothing_else(tier, tmp_path, monkeypatch):
    def full(*arguments, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model, _ = prepared("llama", True, torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    training = Training(full=True, **FAST, state_tier=tier, state_dir=str(tmp_path), sub_group_elements=4096)

    def entered():
        return offload(str(tmp_path / "model"), device="cpu", cpu_memory="64MiB", training=training, **RESERVE)

    with entered() as session:
        a_step(session, 0)
        session.save(tmp_path / "run", {"step": 1})
        session._parts.components["training"]._checkpoints.wait()
        kept = {name: (tmp_path / "run" / name).read_bytes() for name in os.listdir(tmp_path / "run")}
        nbytes = session._parts.components["training"].streamed_training.layout.nbytes
        for number in (1, 2):
            a_step(session, number)
            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", full)
                with pytest.raises(OSError, match="No space left"):
                    session.save(tmp_path / "run", {"step": 2})
                    session._parts.components["training"]._checkpoints.wait()
            assert {name: (tmp_path / "run" / name).read_bytes() for name in os.listdir(tmp_path / "run")} == kept
        a_step(session, 3)
        # The last checkpoint's, and that of the states where they are on disk.
        assert held_bytes(nbytes) <= 2 * nbytes
        session.save(tmp_path / "run", {"step": 4})
        wanted = state_of(session)
    with entered() as session:
        assert session.resume(tmp_path / "run") == {"step": 4}
        assert all(torch.equal(value, wanted[name]) for name, value in state_of(session).items())
