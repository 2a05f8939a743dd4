"""Block files: whole or not there, checked, keyed, shared, cleaned up."""

import errno
import os
import signal
import time

import pytest
import torch

from offload.storage.block_file import BlockFile, BlockFileWriter, key_of, path_of
from offload.storage.devices.cpu import CpuDevice
from offload.storage.errors import CorruptCheckpoint, DiskFolderError, DiskFull
from offload.storage.io_engines.posix import PosixEngine
from offload.storage.reader import DiskReader
from offload.storage.transfer import Link
from tests import processes
from tests.processes import DEADLOCK_SECONDS

KILLED = "0123456789abcdef" * 2
TENSORS = {
    "a": torch.arange(40_000, dtype=torch.float32).view(200, 200),
    "b": torch.ones(3, dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
}


def write(folder, key="key"):
    writer = BlockFileWriter(str(folder), key)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor, "group")
    return writer.finish()


def test_views_and_streams_give_what_was_written(tmp_path):
    write(tmp_path).close()
    file = BlockFile.open(str(tmp_path), "key")
    assert file.groups == {"group": list(TENSORS)}
    for name, tensor in TENSORS.items():
        assert torch.equal(file.view(name), tensor)
        assert file.view(name).untyped_storage().nbytes() == tensor.nbytes
    engine, link = PosixEngine(), Link("disk", 2)
    reader = DiskReader(engine, link)
    ranges = [file.tensors[name].range for name in ("a", "b")]
    load_plan = reader.plan(ranges)
    buffer = CpuDevice().allocate(load_plan.slot_bytes)
    reader.read(load_plan, buffer.memory).wait()
    start = load_plan.offsets[1]
    assert torch.equal(buffer.tensor[start : start + 6].view(torch.bfloat16), TENSORS["b"])
    link.close()
    engine.close()


def test_a_view_can_be_written_and_the_file_stays(tmp_path):
    file = write(tmp_path)
    file.view("a").zero_()
    assert torch.equal(file.view("b"), TENSORS["b"])
    assert torch.equal(BlockFile.open(str(tmp_path), "key").view("a"), TENSORS["a"])


def test_a_flipped_bit_is_found_at_the_first_read(tmp_path):
    file = write(tmp_path)
    with open(file.path, "r+b") as raw:
        raw.seek(file.tensors["a"].range.offset + 5)
        raw.write(b"\xff")
    engine, link = PosixEngine(), Link("disk", 2)
    reader = DiskReader(engine, link)
    ranges = [file.tensors["a"].range]
    load_plan = reader.plan(ranges)
    with pytest.raises(CorruptCheckpoint, match="checksum"):
        reader.read(load_plan, CpuDevice().allocate(load_plan.slot_bytes).memory).wait()
    link.close()
    engine.close()


def test_a_truncated_file_is_refused(tmp_path):
    file = write(tmp_path)
    os.truncate(file.path, os.path.getsize(file.path) - 20)
    with pytest.raises(CorruptCheckpoint, match="not a whole block file"):
        BlockFile.open(str(tmp_path), "key")


def test_other_facts_give_another_key():
    facts = {"files": [{"size": 1}], "dtype": "bfloat16"}
    assert key_of(facts) == key_of(dict(reversed(facts.items())))
    assert key_of(facts) != key_of(facts | {"dtype": "float32"})


def test_nothing_is_visible_before_it_is_whole(tmp_path):
    writer = BlockFileWriter(str(tmp_path), "key")
    writer.add("a", TENSORS["a"])
    assert BlockFile.open(str(tmp_path), "key") is None
    writer.abandon()
    assert not os.listdir(tmp_path)


def test_a_file_without_a_name_vanishes(tmp_path):
    file = write(tmp_path, None)
    assert not os.listdir(tmp_path)
    assert torch.equal(file.view("a"), TENSORS["a"])
    file.close()


def test_a_full_disk(tmp_path, monkeypatch):
    writer = BlockFileWriter(str(tmp_path), "key")
    writer.add("b", TENSORS["b"])

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DiskFull, match="is full"):
            writer.add("a", TENSORS["a"])
    assert torch.equal(writer.so_far().view("b"), TENSORS["b"])
    writer.abandon()
    assert not os.listdir(tmp_path)


def test_no_such_folder(tmp_path):
    with pytest.raises(DiskFolderError, match="does not exist"):
        BlockFileWriter(str(tmp_path / "none"))


def _write_forever(folder, ready):
    writer = BlockFileWriter(folder, KILLED)
    writer.add("b", TENSORS["b"])
    ready.set()
    time.sleep(DEADLOCK_SECONDS)


def test_a_killed_writer_is_cleaned_up_after_and_a_live_one_is_not(tmp_path):
    context = processes.context()
    ready = context.Event()
    process = context.Process(target=_write_forever, args=(str(tmp_path), ready))
    process.start()
    try:
        assert ready.wait(DEADLOCK_SECONDS)
        write(tmp_path, "mine")
        assert any(name.startswith(KILLED) for name in os.listdir(tmp_path)), "a live writer's file was deleted"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    write(tmp_path, "again")
    assert not any(name.startswith(KILLED) for name in os.listdir(tmp_path))
    assert os.path.exists(path_of(str(tmp_path), "again"))


def test_the_second_of_two_writers_leaves_the_first_ones_file_alone(tmp_path):
    """Its readers would find it changed underneath them."""
    second = BlockFileWriter(str(tmp_path), "key")
    first = write(tmp_path)
    before = os.stat(first.path)
    for name, tensor in TENSORS.items():
        second.add(name, tensor, "group")
    kept = second.finish()
    assert (os.stat(kept.path).st_ino, os.stat(kept.path).st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert torch.equal(kept.view("a"), TENSORS["a"])
    assert os.listdir(tmp_path) == [os.path.basename(first.path)]
