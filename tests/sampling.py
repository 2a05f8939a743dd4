"""A part of the cases of each test, another one for each seed: `--sample 3 --sample-seed "$(git rev-parse HEAD)"`."""

import hashlib
from collections import defaultdict

import pytest


def sampled(names, count, seed):
    """Of each test function's cases, which are named `function[case]`, at most so many; as a set.

    Which ones is drawn by the seed, so that all of them run in the course of time.
    """
    cases = defaultdict(list)
    for name in names:
        cases[name.split("[", 1)[0]].append(name)
    return {name for of_one in cases.values() for name in sorted(of_one, key=lambda name: _draw(seed, name))[:count]}


def _draw(seed, name):
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


def pytest_addoption(parser):
    group = parser.getgroup("sampling")
    group.addoption("--sample", type=int, metavar="N", help="run at most N cases of each test function")
    group.addoption("--sample-seed", default="", metavar="TEXT", help="draws which ones")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    count = config.getoption("sample")
    if count is None:
        return
    kept = sampled([item.nodeid for item in items], count, config.getoption("sample_seed"))
    left_out = [item for item in items if item.nodeid not in kept]
    items[:] = [item for item in items if item.nodeid in kept]
    config.hook.pytest_deselected(items=left_out)
