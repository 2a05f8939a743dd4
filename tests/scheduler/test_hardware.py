"""Profiles: read, checked, interpolated."""

import copy
import json

import pytest

from offload.scheduler.hardware import HardwareProfile, MatrixRate, Processor
from offload.storage.errors import ProfileError
from tests.scheduler.machines import RTX_3060

GOOD = RTX_3060.to_dict()


def test_a_profile_goes_through_json(tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(GOOD))
    assert HardwareProfile.load(path) == RTX_3060


def changed(where, value):
    content = copy.deepcopy(GOOD)
    inner = content
    for name in where[:-1]:
        inner = inner[name]
    if value is None:
        del inner[where[-1]]
    else:
        inner[where[-1]] = value
    return content


BROKEN = [
    (changed(("format",), 7), "format"),
    (changed(("colour",), "red"), "colour is not known"),
    (changed(("host", "colour"), "red"), r"host\.colour is not known"),
    (changed(("disk_read",), None), "disk_read is missing"),
    (changed(("disk_read", "bytes_per_second"), 0), r"disk_read\.bytes_per_second must be a number above 0"),
    (changed(("disk_read", "bytes_per_second"), "fast"), "must be a number above 0"),
    (changed(("h2d", "latency_seconds"), -1), "must be a number above 0"),
    (changed(("host", "memory_bytes_per_second"), float("inf")), "finite"),
    (changed(("host", "matrix_rates"), {}), "matrix_rates must be like"),
    (changed(("host", "matrix_rates", "bfloat16"), [{"rows": 1}]), "flops_per_second is missing"),
    (GOOD | {"device": None}, "either all of"),
    ([], "format"),
]


@pytest.mark.parametrize(("content", "sentence"), BROKEN)
def test_a_broken_profile_says_what_is_wrong(content, sentence, tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ProfileError, match=sentence) as refusal:
        HardwareProfile.load(path)
    assert str(path) in str(refusal.value)


def test_no_such_profile(tmp_path):
    with pytest.raises(ProfileError, match="cannot be read"):
        HardwareProfile.load(tmp_path / "none.json")


def test_rates_are_interpolated_in_time():
    """Bound by memory up to 8 rows, then by arithmetic: a product of few rows takes as long as one of one row."""
    rates = (MatrixRate(1, 1e9), MatrixRate(8, 8e9), MatrixRate(64, 8e9))
    processor = Processor("x", 1, 1.0, 1.0, False, {"bfloat16": rates})
    weights = 1e6
    seconds = {rows: processor.matrix_seconds(2 * weights * rows, rows, "bfloat16") for rows in (1, 4, 8, 36, 64, 128)}
    assert seconds[1] == pytest.approx(2e-3)
    assert seconds[4] == pytest.approx(2e-3)
    assert seconds[8] == pytest.approx(2e-3)
    assert seconds[36] == pytest.approx(9e-3)
    assert seconds[64] == pytest.approx(16e-3)
    assert seconds[128] == pytest.approx(32e-3)
    assert processor.matrix_seconds(1e6, 1, "float32") > 0
