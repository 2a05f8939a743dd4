"""The plain reads that streaming is measured against."""

import threading

import pytest

from offload.storage.errors import ReadError
from offload.storage.host_buffer import HostBuffer
from offload.storage.io_engines.posix import PosixEngine
from offload.storage.read_speed import ReadShape, read_speed, spans

UNIT = 4096
SHAPES = (ReadShape(1, UNIT), ReadShape(3, 4 * UNIT))


class Counting(PosixEngine):
    """Notes what it was asked, and how much at once."""

    def __init__(self):
        super().__init__()
        self.asked, self.at_once, self._now, self._lock = [], 0, 0, threading.Lock()

    def read(self, path, file_offset, memory, needed_bytes):
        with self._lock:
            self._now += 1
            self.at_once = max(self.at_once, self._now)
            self.asked.append((file_offset, needed_bytes))
        super().read(path, file_offset, memory, needed_bytes)
        with self._lock:
            self._now -= 1


@pytest.fixture
def engine():
    engine = Counting()
    yield engine
    engine.close()


def test_each_shape_reads_every_byte_once_a_round(tmp_path, engine):
    path = tmp_path / "file"
    path.write_bytes(bytes(33 * UNIT + 100))
    ranges = [(str(path), 0, 10 * UNIT), (str(path), 20 * UNIT, 14 * UNIT)]
    speed = read_speed(engine, ranges, SHAPES, rounds=2)
    # The last unit of the file is there in part.
    single = [(index * UNIT, UNIT) for index in (*range(10), *range(20, 33))] + [(33 * UNIT, 100)]
    fours = [(0, 4), (4, 4), (8, 2), (20, 4), (24, 4), (28, 4)]
    large = [(index * UNIT, count * UNIT) for index, count in fours] + [(32 * UNIT, UNIT + 100)]
    assert sorted(engine.asked) == sorted(2 * (single + large))
    assert engine.at_once <= 3
    assert set(speed.tried) == set(SHAPES)
    assert speed.bytes_per_second == max(speed.tried.values()) == speed.tried[speed.shape]


def test_it_reads_into_the_memory_that_it_is_lent(tmp_path, engine):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 8 * UNIT)
    buffer = HostBuffer(SHAPES[1].memory_bytes)
    read_speed(engine, spans(str(path), 1 << 30, UNIT), SHAPES[1:], memory=buffer.memory)
    # Two requests, and all of the memory in turn.
    assert bytes(buffer.memory[: 8 * UNIT]) == b"x" * 8 * UNIT


def test_a_disk_that_fails_is_told(tmp_path, engine):
    path = tmp_path / "file"
    path.write_bytes(bytes(8 * UNIT))
    engine.read = lambda *args: (_ for _ in ()).throw(ReadError("broken"))
    with pytest.raises(ReadError, match="broken"):
        read_speed(engine, spans(str(path), 8 * UNIT, UNIT), SHAPES)
