"""A part of all tests, another one for each seed.

python -m pytest --cover 1                  each value of each parameter once, instead of all combinations
python -m pytest --cover 2                  each pair of values of two parameters
python -m pytest --cover 1 --sample 2       of those cases at most two of each test
python -m pytest --sample 3 --seed TEXT     three cases of each test
python -m pytest --minutes 10 --seed TEXT   what ten minutes are enough for
"""

import hashlib
import itertools
import time
from collections import defaultdict

import pytest

_NAMED = 8
"""Tests that are named with the number of their cases that were left out; those with the most."""


def sampled(names, count, seed):
    """Of each test function's cases, which are named `function[case]`, at most so many; as a set.

    Which ones is drawn by the seed, so that all of them run in the course of time.
    """
    return {name for of_one in _by_test(names).values() for name in _drawn(of_one, seed)[:count]}


def covering(cases, strength, seed):
    """Cases of each test in which every combination of `strength` parameters' values occurs that occurs at all; as a set.

    Greedy: the next one is the case with the most combinations that are still missing.

    Args:
        cases: what stands for each parameter's value, by parameter, by the name of the case.
    """
    return {name for names in _by_test(cases).values() for name in _covering_one(names, cases, strength, seed)}


def _covering_one(names, cases, strength, seed):
    found = {name: set(itertools.combinations(sorted(cases[name].items()), strength)) for name in _drawn(names, seed)}
    if len(names) == 1 or not all(found.values()):
        # Fewer parameters than that: nothing is combined.
        return names
    missing, chosen = set().union(*found.values()), []
    while missing:
        best = max(found, key=lambda name: len(found[name] & missing))
        missing -= found.pop(best)
        chosen.append(best)
    return chosen


def drawn_order(names, seed):
    """File by file, since tests of one file share what they make; the files in an order that the seed draws."""
    return sorted(names, key=lambda name: _draw(seed, name.split("::", 1)[0]))


def _by_test(names):
    tests = defaultdict(list)
    for name in names:
        tests[name.split("[", 1)[0]].append(name)
    return tests


def _drawn(names, seed):
    return sorted(names, key=lambda name: _draw(seed, name))


def _draw(seed, name):
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


def pytest_addoption(parser):
    group = parser.getgroup("sampling")
    group.addoption("--cover", type=int, metavar="T", help="all combinations of T parameters' values, instead of all cases")
    group.addoption("--sample", type=int, metavar="N", help="at most N cases of each test function")
    group.addoption("--minutes", type=float, metavar="M", help="file after file, drawn by the seed; skip the rest after M")
    group.addoption("--seed", default="", metavar="TEXT", help="draws which ones")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    seed = config.getoption("seed")
    if (strength := config.getoption("cover")) is not None:
        _keep(config, items, covering({item.nodeid: _values(item) for item in items}, strength, seed))
    if (count := config.getoption("sample")) is not None:
        _keep(config, items, sampled([item.nodeid for item in items], count, seed))
    if config.getoption("minutes") is not None:
        by_name = {item.nodeid: item for item in items}
        items[:] = [by_name[name] for name in drawn_order(by_name, seed)]


def _values(item):
    """The parameters of a case; values are the same object wherever they are combined with others."""
    return {name: id(value) for name, value in item.callspec.params.items()} if hasattr(item, "callspec") else {}


def _keep(config, items, names):
    left_out = [item for item in items if item.nodeid not in names]
    config.left_out = [*getattr(config, "left_out", ()), *(item.nodeid for item in left_out)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item.nodeid in names]


def pytest_sessionfinish(session):
    """A worker of xdist tells what it left out: all of them collect the same."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = getattr(session.config, "left_out", [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """The worker's is what the run left out."""
    node.config.left_out = getattr(node, "workeroutput", {}).get("left_out", [])


def pytest_terminal_summary(terminalreporter, config):
    """Say which tests had more cases than those that ran."""
    by_test = {test.split("::", 1)[-1]: len(names) for test, names in _by_test(getattr(config, "left_out", ())).items()}
    if by_test:
        most = sorted(by_test, key=lambda test: -by_test[test])
        named = ", ".join(f"{test} {by_test[test]}" for test in most[:_NAMED])
        others = f", and {len(most) - _NAMED} others" if len(most) > _NAMED else ""
        terminalreporter.write_line(
            f"left out, for another seed or `make test-all`: {sum(by_test.values()):,} cases of {named}{others}"
        )


def pytest_sessionstart(session):
    session.config.begun_at = time.monotonic()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    minutes = item.config.getoption("minutes")
    if minutes is not None and time.monotonic() - item.config.begun_at > 60 * minutes:
        pytest.skip(f"{minutes:g} minutes are over")
