"""Every tensor lands where it belongs, whatever the files look like."""

import numpy
from hypothesis import given
from hypothesis import strategies as st

from offload.storage.blocks import TENSOR_ALIGNMENT_BYTES, FileRange
from offload.storage.read_plan import plan_reads

UNIT = 4096


@st.composite
def scattered_ranges(draw):
    """Tensors that do not overlap, in one or two files, in any order."""
    ranges = []
    for path in draw(st.sampled_from([["a"], ["a", "b"]])):
        end = draw(st.integers(0, 20_000))
        for _ in range(draw(st.integers(1, 6))):
            size = draw(st.integers(1, 30_000))
            ranges.append(FileRange(path, end, size))
            end += size + draw(st.sampled_from([0, 0, 8, 300, 5000, 100_000]))
    return draw(st.permutations(ranges))


@given(scattered_ranges())
def test_bytes_arrive_aligned_and_whole(ranges):
    read_plan = plan_reads(ranges, UNIT)
    files = {path: numpy.random.default_rng(ord(path)).integers(0, 256, 1_000_000, dtype=numpy.uint8) for path in ("a", "b")}
    slot = numpy.zeros(read_plan.slot_bytes, dtype=numpy.uint8)
    for read in read_plan.reads:
        assert read.file_offset % UNIT == read.nbytes % UNIT == read.slot_offset % UNIT == 0
        assert read.slot_offset + read.nbytes <= read_plan.slot_bytes
        slot[read.slot_offset : read.slot_offset + read.nbytes] = files[read.path][
            read.file_offset : read.file_offset + read.nbytes
        ]
    for move in read_plan.moves:
        assert move.target <= move.source
        slot[move.target : move.target + move.nbytes] = slot[move.source : move.source + move.nbytes].copy()
    for item, offset in zip(ranges, read_plan.offsets, strict=True):
        assert offset % TENSOR_ALIGNMENT_BYTES == 0
        assert (slot[offset : offset + item.nbytes] == files[item.path][item.offset : item.end]).all()
    assert read_plan.payload_bytes == sum(item.nbytes for item in ranges)


@given(scattered_ranges())
def test_reads_do_not_overlap_in_the_slot(ranges):
    read_plan = plan_reads(ranges, UNIT)
    spans = sorted((read.slot_offset, read.slot_offset + read.nbytes) for read in read_plan.reads)
    assert all(first[1] <= second[0] for first, second in zip(spans, spans[1:], strict=False))


def test_an_aligned_block_file_needs_no_moves():
    ranges = [FileRange("a", 0, 8192), FileRange("a", 8192, 300), FileRange("a", 8704, 256)]
    read_plan = plan_reads(ranges, UNIT)
    assert not read_plan.moves
    assert len(read_plan.reads) == 1


def test_little_is_read_besides_the_tensors():
    ranges = [FileRange("a", 1000 + 50_000 * index, 50_000) for index in range(9)]
    read_plan = plan_reads(ranges, UNIT)
    assert sum(read.nbytes for read in read_plan.reads) <= read_plan.payload_bytes + 2 * UNIT
