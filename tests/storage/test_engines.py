"""One suite that every read engine passes."""

import ctypes
import inspect
import mmap
import os
import sys
import types

import numpy
import pytest

from offload.storage.errors import CheckpointChanged, ReadError
from offload.storage.fingerprint import fingerprint_of
from offload.storage.host_buffer import HostBuffer
from offload.storage.io_engines.kvikio import KvikioEngine, choose_engine
from offload.storage.io_engines.posix import PosixEngine

SIZE = 100_000


@pytest.fixture
def content(tmp_path):
    data = numpy.random.default_rng(0).integers(0, 256, SIZE, dtype=numpy.uint8).tobytes()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    return str(path), data


class FakeFile:
    """kvikio's file object, as far as it is used, without a CUDA driver."""

    def __init__(self, path, flags):
        self._descriptor = os.open(path, os.O_RDONLY)

    def pread(self, target, size, file_offset):
        done = os.preadv(self._descriptor, [memoryview(target)[:size]], file_offset)
        return types.SimpleNamespace(get=lambda: done)

    def close(self):
        os.close(self._descriptor)


class FileWithoutDriver(FakeFile):
    def pread(self, target, size, file_offset):
        raise RuntimeError("cuInit failed: no driver")


@pytest.fixture(params=["direct", "buffered", "kvikio"])
def engine(request, monkeypatch):
    if request.param == "kvikio":
        monkeypatch.setitem(sys.modules, "kvikio", types.SimpleNamespace(CuFile=FakeFile))
        engine = KvikioEngine()
    else:
        engine = PosixEngine(direct=request.param == "direct")
    yield engine
    engine.close()


def test_reads_whole_units_anywhere(engine, content):
    path, data = content
    engine.open(path)
    buffer = HostBuffer(3 * engine.unit_bytes)
    for unit in range(SIZE // engine.unit_bytes - 3):
        start = unit * engine.unit_bytes
        engine.read(path, start, buffer.memory, len(buffer.memory))
        assert bytes(buffer.memory) == data[start : start + len(buffer.memory)]


def test_the_end_of_the_file_cuts_a_read_short(engine, content):
    path, data = content
    engine.open(path)
    start = SIZE // engine.unit_bytes * engine.unit_bytes
    buffer = HostBuffer(engine.unit_bytes)
    engine.read(path, start, buffer.memory, SIZE - start)
    assert bytes(buffer.memory[: SIZE - start]) == data[start:]
    with pytest.raises(ReadError, match="cut short"):
        engine.read(path, start, buffer.memory, SIZE - start + 1)


def test_reads_odd_places_too(engine, content):
    path, data = content
    engine.open(path)
    memory = memoryview(bytearray(777))
    engine.read_unaligned(path, 12_345, memory)
    assert bytes(memory) == data[12_345 : 12_345 + 777]


@pytest.mark.parametrize("change", ["truncate", "touch", "replace", "remove", "overwrite"])
def test_a_changed_file_is_noticed(engine, content, change):
    path, data = content
    engine.open(path)
    engine.check_unchanged()
    if change == "truncate":
        os.truncate(path, SIZE - 1)
    elif change == "touch":
        os.utime(path, ns=(0, 0))
    elif change == "replace":
        os.rename(path, path + ".old")
        with open(path, "wb") as file:
            file.write(data)
    elif change == "overwrite":
        overwrite(path, bytes(byte ^ 1 for byte in data))
    else:
        os.remove(path)
    with pytest.raises(CheckpointChanged):
        engine.check_unchanged()


def overwrite(path, content):
    """In place, with the time of the last write set back."""
    before = os.stat(path)
    with open(path, "r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", ["link", "mode", "the same again"])
def test_where_the_content_is_the_same_it_goes_on(engine, content, change, monkeypatch):
    path, data = content
    engine.open(path)
    if change == "link":
        os.link(path, path + ".link")
    elif change == "mode":
        os.chmod(path, 0o640)
    else:
        overwrite(path, data)
    engine.check_unchanged()
    # It was looked at, and is not again.
    monkeypatch.setattr("offload.storage.io_engines.posix.fingerprint", lambda descriptor: pytest.fail("read again"))
    engine.check_unchanged()


def test_a_header_and_pages_all_over_a_file_tell_it_from_another(tmp_path):
    header = b'{"a":' + b" " * 10_000 + b"1}"
    content = bytearray(len(header).to_bytes(8, "little") + header + bytes(5 << 20))
    path = tmp_path / "file"

    def found():
        path.write_bytes(content)
        return fingerprint_of(str(path))

    seen = {found()}
    for place in (9_000, len(header) + 7, len(content) - 1, 0, *range(0, len(content), len(content) // 63)):
        content[place] ^= 1
        seen.add(found())
        content[place] ^= 1
    assert len(seen) > 40
    assert found() in seen
    for short in (b"", b"x", b"{" * 9, bytes(100)):
        path.write_bytes(short)
        seen.add(fingerprint_of(str(path)))


def test_a_file_that_was_forgotten_is_opened_anew(engine, content):
    """Paths like /proc/self/fd/9 are another file's once the first one is closed."""
    path, _ = content
    engine.open(path)
    engine.forget(path)
    engine.forget(path)
    other = bytes(range(256)) * (SIZE // 256)
    with open(path, "wb") as file:
        file.write(other)
    engine.open(path)
    buffer = HostBuffer(engine.unit_bytes)
    engine.read(path, 0, buffer.memory, engine.unit_bytes)
    assert bytes(buffer.memory[: engine.unit_bytes]) == other[: engine.unit_bytes]


def test_a_missing_file(engine, tmp_path):
    with pytest.raises(ReadError, match="cannot open"):
        engine.open(str(tmp_path / "none"))


def test_where_direct_reads_are_refused_buffered_ones_are_named(content, monkeypatch):
    path, data = content
    monkeypatch.setattr("offload.storage.io_engines.posix._direct_read_works", lambda descriptor: False)
    engine = PosixEngine()
    engine.open(path)
    buffer = HostBuffer(engine.unit_bytes)
    engine.read(path, 0, buffer.memory, engine.unit_bytes)
    assert bytes(buffer.memory) == data[: engine.unit_bytes]
    assert "refuses O_DIRECT" in engine.fallbacks[0]
    engine.close()


@pytest.fixture
def sample(tmp_path):
    path = tmp_path / "sample"
    path.write_bytes(bytes(64 << 20))
    return str(path)


def test_kvikio_is_used_only_where_it_is_faster(sample, monkeypatch):
    monkeypatch.setitem(sys.modules, "kvikio", types.SimpleNamespace(CuFile=FakeFile))
    for rates, name in (((2.0, 1.0), "kvikio"), ((1.0, 2.0), "posix")):
        speeds = dict(zip(("kvikio", "posix"), rates, strict=True))
        monkeypatch.setattr(
            "offload.storage.io_engines.kvikio._bytes_per_second", lambda engine, path, speeds=speeds: speeds[engine.name]
        )
        engine = choose_engine(sample)
        assert (engine.name, engine.fallbacks) == (name, [])
        engine.close()


def test_without_kvikio_or_its_driver_reads_are_posix(sample, monkeypatch):
    monkeypatch.setitem(sys.modules, "kvikio", None)
    engine = choose_engine(sample)
    assert (engine.name, engine.fallbacks) == ("posix", [])
    engine.close()
    monkeypatch.setitem(sys.modules, "kvikio", types.SimpleNamespace(CuFile=FileWithoutDriver))
    engine = choose_engine(sample)
    assert engine.name == "posix"
    assert "no driver" in engine.fallbacks[0]
    engine.close()


def test_a_failing_disk_is_a_read_error(engine, content, monkeypatch):
    path, _ = content
    engine.open(path)

    def fail(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ReadError, match="Input/output error"):
        engine.read(path, 0, HostBuffer(engine.unit_bytes).memory, engine.unit_bytes)


def test_the_probe_reads_what_no_cache_holds(sample, monkeypatch):
    """Else whoever reads through the page cache finds there what the other engine has read."""
    from offload.storage.io_engines import kvikio

    steps = []

    class Engine(PosixEngine):
        def read(self, path, file_offset, memory, needed_bytes):
            steps.append(("read", file_offset))

    monkeypatch.setattr(kvikio, "drop_cached", lambda path, offset, nbytes: steps.append(("drop", offset)))
    engine = Engine()
    kvikio._bytes_per_second(engine, sample)
    engine.close()
    assert steps == [("drop", 0), ("read", 0), ("drop", 32 << 20), ("read", 32 << 20)]


def test_dropped_pages_are_read_from_the_disk_again(sample):
    """As far as a page cache can be asked: by how many of the file's pages are in memory."""
    from offload.storage.io_engines.kvikio import drop_cached

    with open(sample, "rb") as file:
        os.fsync(file.fileno())
        file.read()
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            address = numpy.frombuffer(mapped, dtype=numpy.uint8).ctypes.data
            resident = (ctypes.c_ubyte * (len(mapped) // 4096))()
            libc = ctypes.CDLL(None, use_errno=True)

            def pages_in_memory():
                libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), resident)
                return sum(value & 1 for value in resident)

            before = pages_in_memory()
            drop_cached(sample, 0, len(mapped))
            assert pages_in_memory() < before


def test_kvikio_has_the_calls_that_are_made(tmp_path):
    """The real library, without a driver: what is called is there, and takes what it is given."""
    kvikio = pytest.importorskip("kvikio")
    pread = inspect.signature(kvikio.CuFile.pread).parameters
    assert list(pread)[:4] == ["self", "buf", "size", "file_offset"]
    assert {"__init__", "close"} <= set(dir(kvikio.CuFile))
    assert list(inspect.signature(kvikio.CuFile.__init__).parameters)[1:3] == ["file", "flags"]
