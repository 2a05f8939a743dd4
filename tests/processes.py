"""Processes of their own for tests, which begin in a moment: they are forked from one that has imported everything."""

import multiprocessing

DEADLOCK_SECONDS = 280
"""Time limits are for deadlocks, not for slow hours: this is less than pytest's own, so that what hangs is named."""

_IMPORTED = ["torch", "transformers", "peft", "offload.cli.main", "transformers.models.llama.modeling_llama"]


def context():
    """Of `multiprocessing`; a worker of the test suite imports once."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(_IMPORTED)
    return found
