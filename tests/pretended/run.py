"""Runs a module with the pretended card: `python -m tests.pretended.run MODULE [ARGUMENT ...]`."""

import runpy
import sys

from tests.pretended import plugin

if __name__ == "__main__":
    if plugin.CARD is None:
        sys.exit(plugin.WHY_NOT)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
