"""Files that this process writes again and again."""

import errno
import os

import pytest

from storage.arena import HostBuffer
from storage.errors import DiskFolderError, DiskFull, ReadError
from storage.state_file import StateFile, remove_unlocked


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def file(request, tmp_path, monkeypatch):
    if not request.param:
        monkeypatch.setattr("storage.state_file.direct_io_unit_bytes", lambda descriptor: 1 << 20)
    made = StateFile(str(tmp_path / "states.bin"), 3 * 4096)
    assert made.direct == request.param
    yield made
    made.close()


def test_what_was_written_is_read_and_the_rest_is_zero(file):
    buffer = HostBuffer(8192)
    buffer.tensor.random_(0, 256)
    file.write(4096, buffer.memory[:4096])
    file.read(0, (other := HostBuffer(8192)).memory)
    assert not other.tensor[:4096].any()
    assert other.tensor[4096:8192].equal(buffer.tensor[:4096])
    file.sync()


def test_it_grows(file):
    file.reserve(10 * 4096 - 5)
    assert file.nbytes == 10 * 4096 == os.path.getsize(file.path)
    file.reserve(4096)
    assert file.nbytes == 10 * 4096


def test_a_shorter_file_is_told(file):
    os.truncate(file.path, 4096)
    with pytest.raises(ReadError, match="cut short"):
        file.read(0, HostBuffer(8192).memory)


def test_one_process_at_a_time(file):
    with pytest.raises(DiskFolderError, match="another process"):
        StateFile(file.path, 4096)
    remove_unlocked(file.path)
    assert os.path.exists(file.path)
    file.close()
    StateFile(file.path, 4096).close()
    remove_unlocked(file.path)
    assert not os.path.exists(file.path)
    remove_unlocked(file.path)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFull, match="free some space"):
        StateFile(str(tmp_path / "states.bin"), 1 << 40)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DiskFolderError, match="cannot be written"):
        StateFile(str(tmp_path / "none" / "states.bin"), 4096)
