"""Files that this process writes again and again."""

import errno
import os

import pytest

from offload.storage.errors import DiskFolderError, DiskFull, ReadError
from offload.storage.host_buffer import HostBuffer
from offload.storage.state_file import StateFile


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def file(request, tmp_path, monkeypatch):
    if not request.param:
        monkeypatch.setattr("offload.storage.state_file.direct_io_unit_bytes", lambda descriptor: 1 << 20)
    made = StateFile.new(str(tmp_path), 3 * 4096)
    assert made.direct == request.param
    assert not list(tmp_path.iterdir())
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


def filled(file):
    buffer = HostBuffer(file.nbytes)
    buffer.tensor.random_(0, 256)
    file.write(0, buffer.memory[: file.nbytes])
    return bytes(buffer.memory[: file.nbytes])


def test_a_name_that_is_given_later_stays(file, tmp_path):
    content = filled(file)
    assert file.link(str(tmp_path / "kept.bin"))
    file.close()
    assert (tmp_path / "kept.bin").read_bytes() == content
    again = StateFile.open(str(tmp_path / "kept.bin"))
    assert again.nbytes == len(content)
    again.close()


@pytest.mark.parametrize("error", [errno.EXDEV, errno.ENOENT, errno.EPERM])
def test_where_it_cannot_get_a_name_it_is_copied(error, file, tmp_path, monkeypatch):
    def refused(*arguments, **more):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "link", refused)
    content = filled(file)
    assert not file.link(str(tmp_path / "kept.bin"))
    assert (tmp_path / "kept.bin").read_bytes() == content


def test_a_filesystem_where_every_file_has_a_name_at_first(tmp_path, monkeypatch):
    real = os.open

    def refused(path, flags, *mode, **more):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return real(path, flags, *mode, **more)

    monkeypatch.setattr(os, "open", refused)
    file = StateFile.new(str(tmp_path), 4096)
    assert not list(tmp_path.iterdir())
    content = filled(file)
    assert not file.link(str(tmp_path / "kept.bin"))
    assert (tmp_path / "kept.bin").read_bytes() == content
    file.close()


def test_a_flipped_bit_changes_a_checksum(file, monkeypatch):
    monkeypatch.setattr("offload.storage.state_file._CHECKED_BYTES", 8192)
    content = bytearray(filled(file))
    before = file.checksums(file.nbytes)
    assert len(before) == 2
    content[5000] ^= 4
    buffer = HostBuffer(file.nbytes)
    buffer.memory[: file.nbytes] = bytes(content)
    file.write(0, buffer.memory[: file.nbytes])
    after = file.checksums(file.nbytes)
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_only_a_regular_file_of_nobody_else_is_opened(tmp_path):
    (tmp_path / "kept.bin").write_bytes(bytes(4096))
    file = StateFile.open(str(tmp_path / "kept.bin"))
    with pytest.raises(DiskFolderError, match="another process"):
        StateFile.open(str(tmp_path / "kept.bin"))
    file.close()
    StateFile.open(str(tmp_path / "kept.bin")).close()
    (tmp_path / "link.bin").symlink_to(tmp_path / "kept.bin")
    for path in (tmp_path / "link.bin", tmp_path / "none.bin", tmp_path):
        with pytest.raises(DiskFolderError):
            StateFile.open(str(path))


def test_a_filesystem_without_locks_is_read_all_the_same(tmp_path, monkeypatch):
    def refused(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (tmp_path / "kept.bin").write_bytes(bytes(4096))
    monkeypatch.setattr("fcntl.flock", refused)
    StateFile.open(str(tmp_path / "kept.bin")).close()


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFull, match="free some space"):
        StateFile.new(str(tmp_path), 1 << 40)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DiskFolderError, match="cannot be written"):
        StateFile.new(str(tmp_path / "none"), 4096)
