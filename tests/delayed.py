"""A device with memory of its own whose copies end late and in another order than they began.

It computes with host tensors, so that every test can use it; what it shares with a real one is that a copy has to be
waited for, and that a slot must not be overwritten or read too early. Its fresh memory is full of NaN.
"""

import random
import threading
import time
from dataclasses import dataclass, field

import torch

from offload.storage.devices.base import Copy, unversioned
from offload.storage.host_buffer import HostBuffer


@dataclass(eq=False)
class LateEvent:
    passed: threading.Event = field(default_factory=threading.Event)

    def synchronize(self) -> None:
        assert self.passed.wait(30), "a copy never ended"


class DelayedDevice:
    name = "delayed"
    hardware_name = "delayed"
    torch_device = torch.device("cpu")
    shares_host_memory = False
    copy_link = "h2d"
    workspace_bytes = 0
    emulated_dtypes = frozenset()

    def __init__(self, longest_delay_seconds: float = 0.004, seed: int = 0) -> None:
        self.ended = []
        self.stalls = []
        self.in_flight = 0
        self.most_in_flight = 0
        self._longest = longest_delay_seconds
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def allocate(self, nbytes: int) -> HostBuffer:
        buffer = HostBuffer(nbytes)
        buffer.tensor.fill_(0xFF)
        return buffer

    def lock_pages(self, buffer: object) -> bool:
        return True

    def unlock_pages(self, buffer: object) -> None:
        pass

    def copy_in(self, copies, after=(), name=""):
        event = LateEvent()
        with self._lock:
            delay = self._random.uniform(0, self._longest)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)

        def copy() -> None:
            for earlier in after:
                if earlier is not None:
                    earlier.synchronize()
            # Until they arrive, the targets hold neither the old nor the new values.
            for target, _ in copies:
                unversioned(target).view(-1).view(torch.uint8).fill_(0xFF)
            time.sleep(delay)
            for target, source in copies:
                unversioned(target).copy_(source)
            with self._lock:
                self.in_flight -= 1
                now = time.perf_counter()
                self.ended.append(Copy(name, now - delay, now, sum(source.nbytes for _, source in copies)))
            event.passed.set()

        threading.Thread(target=copy, name="delayed-copy", daemon=True).start()
        return event

    def convert(self, work, after):
        event = LateEvent()

        def run() -> None:
            after.synchronize()
            time.sleep(self._random.uniform(0, self._longest))
            work()
            event.passed.set()

        threading.Thread(target=run, name="delayed-conversion", daemon=True).start()
        return event

    def copy_out(self, target, source, name=""):
        return self.copy_in([(target, source.detach())], name=name)

    def ended_copies(self):
        ended, self.ended = self.ended, []
        return ended

    def record(self) -> LateEvent:
        event = LateEvent()
        event.passed.set()
        return event

    def wait(self, event: LateEvent) -> None:
        begun = time.perf_counter()
        event.synchronize()
        self.stalls.append((begun, time.perf_counter()))

    def ended_stalls(self):
        ended, self.stalls = self.stalls, []
        return ended

    def synchronize(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 1 << 30

    def peak_bytes(self) -> int | None:
        return None
