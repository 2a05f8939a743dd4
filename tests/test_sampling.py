"""A sample leaves no test out, and in the course of time no case."""

import itertools
from pathlib import Path

import pytest

from tests.sampling import covering, drawn_order, sampled

NAMES = ["a.py::test_one", *(f"a.py::test_many[{case}-{kind}]" for case in range(5) for kind in "xyz"), "b.py::test_many[0]"]


def test_every_test_runs_and_no_more_cases_than_asked():
    for seed in map(str, range(20)):
        kept = sampled(NAMES, 3, seed)
        assert {"a.py::test_one", "b.py::test_many[0]"} < kept
        assert len(kept) == 5


def test_a_seed_draws_the_same_and_all_seeds_draw_all():
    assert sampled(NAMES, 3, "a") == sampled(reversed(NAMES), 3, "a")
    assert set.union(*(sampled(NAMES, 3, str(seed)) for seed in range(60))) == set(NAMES)


GRID = {
    f"a.py::test_grid[{a}-{b}-{c}]": {"a": a, "b": b, "c": c}
    for a, b, c in itertools.product(range(4), range(3), range(2))
    if (a, b) != (0, 0)
}


def combinations(names, strength):
    return {pair for name in names for pair in itertools.combinations(sorted(GRID[name].items()), strength)}


@pytest.mark.parametrize(("strength", "most"), [(1, 5), (2, 14), (3, len(GRID))])
def test_every_combination_of_values_that_occurs_is_covered(strength, most):
    for seed in map(str, range(20)):
        kept = covering(GRID, strength, seed)
        assert combinations(kept, strength) == combinations(GRID, strength)
        assert len(kept) <= most
    assert set.union(*(covering(GRID, strength, str(seed)) for seed in range(200))) == set(GRID)


def test_tests_of_fewer_parameters_keep_all_their_cases():
    cases = {"a.py::test_one": {}, "a.py::test_two[0]": {"a": 0}, "a.py::test_two[1]": {"a": 1}}
    for strength in (1, 2):
        assert covering(cases, strength, "") == set(cases)


def test_each_file_comes_first_for_some_seed_and_stays_together():
    orders = [drawn_order(NAMES, str(seed)) for seed in range(20)]
    assert {order[0].split("::")[0] for order in orders} == {"a.py", "b.py"}
    for order in orders:
        assert sorted(order) == sorted(NAMES)
        assert [name for name in order if name.startswith("a")] == NAMES[:-1]


pytest_plugins = ["pytester"]


@pytest.fixture
def run(pytester, monkeypatch):
    """Runs a file of tests with this plugin, in a process of its own."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))

    def run(content, *options):
        pytester.makepyfile(content)
        workers = [] if "-n" in options else ["-p", "no:xdist"]
        return pytester.runpytest_subprocess("-p", "tests.sampling", *workers, *options)

    return run


def test_the_option_finds_the_values_of_each_parameter(run):
    grid = "import pytest\n@pytest.mark.parametrize('a', [[1], [2], [3]])\n@pytest.mark.parametrize('b', ['x', 'y'])\ndef test_a(a, b): pass\n"
    run(grid, "--cover", "1").assert_outcomes(passed=3, deselected=3)
    run(grid, "--cover", "2").assert_outcomes(passed=6)
    run(grid, "--cover", "1", "--sample", "2").assert_outcomes(passed=2, deselected=4)
    result = run(grid, "--sample", "1")
    result.assert_outcomes(passed=1, deselected=5)
    named = "left out, for another seed or `make test-all`: 5 cases of test_a 5"
    result.stdout.fnmatch_lines([named])
    run(grid, "--sample", "1", "-n", "2").stdout.fnmatch_lines([named])


def test_what_the_minutes_are_not_enough_for_is_skipped_and_counted(run):
    tests = "import time\ndef test_a(): time.sleep(0.2)\ndef test_b(): assert False\ndef test_c(): assert False\n"
    found = run(tests, "--minutes", "0.002", "-rs")
    found.assert_outcomes(passed=1, skipped=2)
    found.stdout.fnmatch_lines(["*SKIPPED [[]2[]]*0.002 minutes are over*"])
