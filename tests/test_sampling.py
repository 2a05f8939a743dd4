"""A sample leaves no test out, and in the course of time no case."""

from tests.sampling import sampled

NAMES = ["a.py::test_one", *(f"a.py::test_many[{case}-{kind}]" for case in range(5) for kind in "xyz"), "b.py::test_many[0]"]


def test_every_test_runs_and_no_more_cases_than_asked():
    for seed in map(str, range(20)):
        kept = sampled(NAMES, 3, seed)
        assert {"a.py::test_one", "b.py::test_many[0]"} < kept
        assert len(kept) == 5


def test_a_seed_draws_the_same_and_all_seeds_draw_all():
    assert sampled(NAMES, 3, "a") == sampled(reversed(NAMES), 3, "a")
    assert set.union(*(sampled(NAMES, 3, str(seed)) for seed in range(60))) == set(NAMES)
