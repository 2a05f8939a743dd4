"""How an optimizer's work is cut, and where its states lie."""

from hypothesis import given
from hypothesis import strategies as st

from offload.scheduler.sub_groups import MASTER, PIECE_ELEMENTS, Moment, Trained, lay_out

MOMENTS = (Moment("exp_avg"), Moment("exp_avg_sq"))


def laid_out(sizes, most=3 * PIECE_ELEMENTS, dtype="bfloat16", master="float32"):
    parameters = [Trained(f"p{index}", size, dtype) for index, size in enumerate(sizes)]
    return lay_out([("a", parameters[::2]), ("b", parameters[1::2])], MOMENTS, master, most)


@given(st.lists(st.integers(1, 10 * PIECE_ELEMENTS), min_size=1, max_size=8), st.integers(1, 5 * PIECE_ELEMENTS))
def test_every_element_is_in_one_piece_and_every_byte_in_one_place(sizes, most):
    layout = laid_out(sizes, most)
    seen = {}
    taken = []
    for group in layout.groups:
        assert group.elements <= max(most, PIECE_ELEMENTS)
        assert len({piece.parameter.dtype for piece in group.pieces}) == 1
        for piece in group.pieces:
            assert piece.start == seen.get(piece.parameter.name, 0)
            assert piece.start % PIECE_ELEMENTS == 0
            seen[piece.parameter.name] = piece.stop
        for region in (group.weights, group.states):
            assert region.offset % 4096 == region.nbytes % 4096 == 0
            taken.append((region.offset, region.offset + region.nbytes))
            ends = [0, *(span.offset + span.nbytes for span in region.spans)]
            assert all(span.offset % 256 == 0 and span.offset >= end for span, end in zip(region.spans, ends, strict=False))
            assert ends[-1] <= region.nbytes
    assert seen == {f"p{index}": size for index, size in enumerate(sizes)}
    taken.sort()
    assert all(end == begin for (_, end), (begin, _) in zip(taken, taken[1:], strict=False))
    assert layout.nbytes == taken[-1][1] == layout.state_bytes + layout.weight_bytes


def test_the_pieces_of_a_weight_lie_side_by_side():
    (first, second, third) = laid_out([7 * PIECE_ELEMENTS]).of("a")
    assert [group.elements for group in (first, second, third)] == [3 * PIECE_ELEMENTS] * 2 + [PIECE_ELEMENTS]
    assert first.weights.offset + 3 * PIECE_ELEMENTS * 2 == second.weights.offset
    assert second.weights.offset + 3 * PIECE_ELEMENTS * 2 == third.weights.offset


def test_masters_are_kept_where_weights_are_coarser():
    kinds = [{span.kind for span in laid_out([10], dtype=dtype).groups[0].states.spans} for dtype in ("bfloat16", "float32")]
    assert kinds == [{MASTER, "exp_avg", "exp_avg_sq"}, {"exp_avg", "exp_avg_sq"}]
    assert not laid_out([10], master=None).groups[0].owns_master
    assert {span.dtype for span in laid_out([10], master=None).groups[0].states.spans} == {"bfloat16"}


def test_bytes_a_parameter():
    layout = laid_out([1 << 20, 1 << 20], most=1 << 19)
    assert layout.state_bytes == 12 << 21
    assert layout.written_bytes == 14 << 21


def test_moments_may_share_elements():
    eight = (Moment("exp_avg", "int8"), Moment("scale", "float32", 256))
    (group,) = lay_out([("a", [Trained("p", 1000, "float32")])], eight, "float32", 4096).groups
    assert {span.kind: span.nbytes for span in group.states.spans} == {"exp_avg": 1000, "scale": 16}
