"""Puts the pretended card into the process before torch is there: `-p tests.pretended.plugin`.

torch asks for a card's hooks while it is imported, and keeps the answer.
"""

import ctypes
import sys
from typing import Any

import pytest

from tests.pretended import build

if "torch" in sys.modules:
    raise RuntimeError("the pretended card must be loaded before torch: give -p tests.pretended.plugin first")

CARD: Any = None
"""The extension module, where there is a pretended card."""

WHY_NOT = ""


def _load() -> None:
    global CARD, WHY_NOT
    try:
        library = build.built()
    except build.Unavailable as error:
        WHY_NOT = str(error)
        return
    for name in ("libc10.so", "libtorch_cpu.so", "libtorch.so", "libtorch_python.so"):
        ctypes.CDLL(str(build.torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    from tests.pretended import torch_cuda

    CARD = torch_cuda.install(library)


_load()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if CARD is None:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=WHY_NOT))


@pytest.fixture(autouse=True)
def _nothing_freed_too_early() -> Any:
    yield
    if CARD is not None:
        found = CARD.violations()
        assert not found, found[0]
