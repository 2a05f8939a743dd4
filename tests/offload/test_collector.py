"""Python's garbage collector is held back while a session is entered, and is afterwards as it was."""

import gc
import threading

import pytest

from offload import offload
from offload.collector import held_collector
from offload.storage.errors import OffloadError
from tests.architectures import make


@pytest.fixture(params=[True, False], ids=["enabled", "disabled"])
def enabled(request):
    """Whether the user has it on."""
    (gc.enable if request.param else gc.disable)()
    yield request.param
    gc.enable()


def test_it_is_afterwards_as_it_was(enabled):
    with pytest.raises(ValueError, match="inside"), held_collector():
        assert not gc.isenabled()
        with held_collector():
            pass
        assert not gc.isenabled()
        raise ValueError("inside")
    assert gc.isenabled() == enabled


def test_the_last_thread_that_leaves_lets_it_go_on(enabled):
    """The one who came first, and saw how it was, may be gone by then."""
    with held_collector():
        entered, leave = threading.Event(), threading.Event()

        def other():
            with held_collector():
                entered.set()
                leave.wait()

        thread = threading.Thread(target=other)
        thread.start()
        entered.wait()
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled() == enabled


def test_a_session_collects_again_once_it_is_entered(enabled):
    with offload(make("llama"), device="cpu"):
        assert gc.isenabled() == enabled
    with pytest.raises(OffloadError), offload("no/such/folder/here", device="cpu"):
        pass
    assert gc.isenabled() == enabled
