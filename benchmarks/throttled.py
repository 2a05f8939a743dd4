"""A machine of known rates, made of this one: a disk, a link and processors that are as slow as they are told to be.

The disk and the link pace real reads and copies; the processors pace the products with weights. What is measured on it
is the runtime, and what it should take can be computed.
"""

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import nn

from scheduler.hardware import HardwareProfile, LinkRate, MatrixRate, Processor
from storage.arena import HostBuffer
from storage.cpu import CpuDevice
from storage.device import Copy
from storage.engines.posix import PosixEngine


@dataclass(frozen=True)
class Rates:
    """Bytes and FLOPs a second; `link` is None where the CPU computes from its own memory."""

    disk: float
    link: float | None
    device_flops: float
    host_flops: float

    def profile(self, operation_seconds: float) -> HardwareProfile:
        """The machine, described.

        Args:
            operation_seconds: of one tensor operation, which is this machine's own.
        """

        def processor(name: str, flops: float) -> Processor:
            rates = {"float32": (MatrixRate(1, flops), MatrixRate(4096, flops))}
            return Processor(name, 1 << 40, 1e12, operation_seconds, False, rates)

        link = None if self.link is None else LinkRate(self.link)
        host_flops = self.host_flops if link else self.device_flops
        return HardwareProfile(
            hardware_id="throttled",
            description="a machine of known rates",
            measured_at="",
            host=processor("host", host_flops),
            device=processor("device", self.device_flops) if link else None,
            disk_read=LinkRate(self.disk),
            disk_write=LinkRate(self.disk),
            h2d=link,
            d2h=link,
            h2d_pageable=link,
        )


class Pace:
    """Lets bytes pass one after another at a fixed rate."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._free_at = 0.0
        self._lock = threading.Lock()

    def reserve(self, nbytes: int) -> float:
        """The moment at which the last of the bytes will have passed."""
        with self._lock:
            self._free_at = max(self._free_at, time.perf_counter()) + nbytes / self._rate
            return self._free_at


def sleep_until(moment: float) -> None:
    while (left := moment - time.perf_counter()) > 0:
        time.sleep(left)


class ThrottledEngine(PosixEngine):
    name = "throttled"

    def __init__(self, bytes_per_second: float) -> None:
        super().__init__()
        self._pace = Pace(bytes_per_second)

    def read(self, path: str, file_offset: int, memory: memoryview, needed_bytes: int) -> None:
        until = self._pace.reserve(needed_bytes)
        super().read(path, file_offset, memory, needed_bytes)
        sleep_until(until)


@dataclass(eq=False)
class PacedEvent:
    passed: threading.Event = field(default_factory=threading.Event)

    def synchronize(self) -> None:
        assert self.passed.wait(60), "a copy never ended"


class ThrottledDevice:
    """A second device with memory of its own, made of CPU tensors: one copy after another, at a fixed rate."""

    name = "throttled"
    torch_device = torch.device("cpu")
    host_memory = False
    copy_link = "h2d"

    def __init__(self, bytes_per_second: float) -> None:
        self.ended = []
        self._pace = Pace(bytes_per_second)
        self.stalls = []
        self._asked: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._copy_all, name="throttled-copies", daemon=True).start()

    def allocate(self, nbytes: int) -> HostBuffer:
        return HostBuffer(nbytes)

    def lock_pages(self, buffer: object) -> bool:
        return True

    def unlock_pages(self, buffer: object) -> None:
        pass

    def copy_in(self, target, source, after, name=""):
        event = PacedEvent()
        self._asked.put((target, source, after, event, name))
        return event

    def _copy_all(self) -> None:
        while True:
            target, source, after, event, name = self._asked.get()
            if after is not None:
                after.synchronize()
            begun = time.perf_counter()
            until = self._pace.reserve(source.nbytes)
            with torch.inference_mode(False), torch.no_grad():
                target.copy_(source)
            sleep_until(until)
            self.ended.append(Copy(name, begun, time.perf_counter(), source.nbytes))
            event.passed.set()

    def ended_copies(self):
        ended, self.ended = self.ended, []
        return ended

    def record(self) -> PacedEvent:
        event = PacedEvent()
        event.passed.set()
        return event

    def wait(self, event: PacedEvent) -> None:
        begun = time.perf_counter()
        event.synchronize()
        self.stalls.append((begun, time.perf_counter()))

    def ended_stalls(self):
        ended, self.stalls = self.stalls, []
        return ended

    def synchronize(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 1 << 40

    def peak_bytes(self) -> int | None:
        return None


@contextmanager
def machine(rates: Rates) -> Iterator[None]:
    """Sessions that are opened inside run on this machine."""
    device = CpuDevice() if rates.link is None else ThrottledDevice(rates.link)
    with (
        patch("offload.api.resolve_device", lambda name: device),
        patch("offload.api.choose_engine", lambda sample: ThrottledEngine(rates.disk)),
        patch("offload.api.PosixEngine", lambda: ThrottledEngine(rates.disk)),
    ):
        yield


@contextmanager
def paced_products(model: nn.Module, rates: Rates, on_host: frozenset[str] = frozenset()) -> Iterator[None]:
    """Products with weights take as long as the rates say: those of the blocks in `on_host` at the host's rate."""
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            slow = any(name.startswith(f"{key}.") for key in on_host)
            rate = rates.host_flops if slow else rates.device_flops
            handles += _pace_one(module, 2.0 * module.in_features * module.out_features / rate)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pace_one(module: nn.Module, seconds_per_row: float) -> list:
    begun = [0.0]

    def before(module: nn.Module, args) -> None:
        begun[0] = time.perf_counter()

    def after(module: nn.Module, args, output) -> None:
        rows = output.numel() // output.shape[-1]
        sleep_until(begun[0] + rows * seconds_per_row)

    # Before all others, and inside of any window.
    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
