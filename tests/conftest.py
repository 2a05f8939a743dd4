"""Settings that hold for every test."""

import gc
import os
import sys
import tempfile
import threading

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# So that no test measures this machine first.
os.environ["OFFLOAD_HARDWARE"] = os.path.join(os.path.dirname(__file__), "described_machine.json")

import pytest
import torch
import transformers

from tests.compiled import compiled_decoders

pytest_plugins = ["tests.sampling"]

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
# Beside another worker a second thread would only be in its way.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
# What was imported is never garbage: looking for it after each test would take longer than most tests.
gc.collect()
gc.freeze()


def pytest_configure(config):
    """Nothing is known of an earlier run; the workers of this one share what they count."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        cache = tempfile.TemporaryDirectory(prefix="offload-tests-")
        os.environ["OFFLOAD_PROFILES"] = cache.name
        config.add_cleanup(cache.cleanup)


@pytest.fixture(autouse=True, scope="session")
def one_import_package():
    """Nothing but `offload` is imported: a module of the user's may be called `storage` or `scheduler`."""
    yield
    assert not {"scheduler", "storage"} & sys.modules.keys()


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """No test leaves a thread of the runtime or a file handle open."""
    handles, threads = open_weight_files(), runtime_threads()
    yield
    if runtime_threads() != threads or open_weight_files() != handles:
        # What a test's own objects hold in a cycle. Looking for cycles after each test would take a third of all time.
        gc.collect()
    assert runtime_threads() == threads, "threads left"
    assert open_weight_files() == handles, "file handles left"


@pytest.fixture(params=["torch", "native"])
def decoders(request):
    """What decodes: torch, or what is compiled."""
    if request.param == "torch":
        yield
    else:
        with compiled_decoders():
            yield


@pytest.fixture
def card():
    """The pretended card's own figures; skipped on a real one."""
    plugin = sys.modules.get("tests.pretended.plugin")
    if plugin is None or plugin.CARD is None:
        pytest.skip("it is about the pretended card: -p tests.pretended.plugin")
    return plugin.CARD


def runtime_threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("offload-"))


def open_weight_files() -> list[str]:
    """Targets of this process's open descriptors that are weight files or spilled blocks."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        if ".safetensors" in target or ".blocks" in target or ".partial" in target or "spill" in target:
            found.append(target)
    return sorted(found)
