"""Buffers that bytes pass through: as few as they may be, each with one user at a time."""

import threading

from offload.storage.host_buffer import HostBuffer
from offload.storage.staging_ring import StagingRing


class Passed:
    def __init__(self):
        self.waited = False

    def synchronize(self):
        self.waited = True


def test_no_more_are_made_than_may_be_and_the_smallest_that_fits_is_taken():
    made, gone = [], []
    ring = StagingRing(lambda nbytes: made.append(HostBuffer(nbytes)) or made[-1], gone.append, limit=2)
    small, large = ring.take(4096), ring.take(16384)
    assert ring.take(4096) is None
    ring.give(large)
    ring.give(small)
    assert ring.take(100) is small
    assert ring.take(100) is large
    ring.give(small)
    # Too small: it gives its place to a larger one.
    assert ring.take(8192).nbytes == 8192
    assert gone == [small]
    assert len(made) == 3
    ring.close()
    assert set(map(id, gone)) == set(map(id, made))


def test_whoever_waits_gets_what_is_given_back_and_what_is_to_be_passed_first():
    ring, event = StagingRing.of([HostBuffer(4096)]), Passed()
    buffer = ring.wait_take(4096)
    assert ring.after(buffer) is None
    found = []
    thread = threading.Thread(target=lambda: found.append(ring.wait_take(4096)))
    thread.start()
    ring.give(buffer, event)
    thread.join()
    assert found == [buffer]
    assert ring.after(buffer) is event
    assert ring.after(buffer) is None


def test_a_buffer_is_not_let_go_of_while_a_copy_out_of_it_may_be_under_way():
    event = Passed()
    ring = StagingRing(HostBuffer, limit=1)
    ring.give(ring.take(4096), event)
    ring.close()
    assert event.waited
