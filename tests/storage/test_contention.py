"""What products and reads leave of each other's rate."""

import torch

from offload.storage.contention import Contention, measure_contention
from offload.storage.io_engines.posix import PosixEngine
from offload.storage.read_speed import ReadShape


def test_shares_are_measured(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(4 << 20))
    engine = PosixEngine()
    try:
        found = measure_contention(engine, [(str(file), 0, 4 << 20)], ReadShape(2, 1 << 20), 0.05, torch.float32)
    finally:
        engine.close()
    assert 0 < found.compute <= 1
    assert 0 < found.reads <= 1


def test_the_least_that_both_can_take():
    assert Contention(1.0, 1.0).least_seconds(2.0, 3.0) == 3.0
    # They are in each other's way so much that nothing is won.
    assert Contention(0.5, 0.5).least_seconds(1.0, 1.0) == 2.0
    assert Contention(0.5, 0.5).least_seconds(1.0, 0.0) == 1.0
