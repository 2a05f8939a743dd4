"""A machine of known rates, made of this one: a disk, a link and processors that are as slow as they are told to be.

The disk and the link pace real reads and copies; the processors pace the products with weights. What is measured on it
is the runtime, and what it should take can be computed.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from unittest.mock import patch

import torch
from torch import nn

from offload.scheduler.hardware import HardwareProfile, LinkRate, MatrixRate, Processor
from offload.scheduler.plan import Plan
from offload.storage.devices.base import Copy, unversioned
from offload.storage.devices.cpu import CpuDevice
from offload.storage.host_buffer import HostBuffer
from offload.storage.io_engines.posix import PosixEngine

_SLEEP_LATE_SECONDS = 1e-4
"""By which a sleep is usually too long."""

_LATE_SECONDS = 1e-3
"""And at most, but for a machine that is busy otherwise."""


@dataclass(frozen=True)
class Speed:
    """Of a processor: products of few rows are bound by reading the weights, those of many by arithmetic."""

    memory_bytes_per_second: float
    flops_per_second: float

    def product_seconds(self, rows: int, weights: int) -> float:
        """Of `rows` rows with a matrix of `weights` fp32 weights."""
        return max(weights * 4 / self.memory_bytes_per_second, 2.0 * rows * weights / self.flops_per_second)

    def matrix_rates(self) -> tuple[MatrixRate, ...]:
        ridge = max(2, round(2 * self.flops_per_second / self.memory_bytes_per_second))
        rows = (1, ridge, 4096)
        return tuple(MatrixRate(count, 2.0 * count / self.product_seconds(count, 1)) for count in rows)


@dataclass(frozen=True)
class Rates:
    """Bytes a second of disk and link, and the processors; `link` is None where the CPU computes from its own memory."""

    disk: float
    link: float | None
    device: Speed
    host: Speed

    def profile(self, operation_seconds: float, window_seconds: float) -> HardwareProfile:
        """The machine, described.

        Args:
            operation_seconds: of one tensor operation, which is this machine's own.
            window_seconds: of the runtime around a block, likewise.
        """

        def processor(name: str, speed: Speed) -> Processor:
            # Everything but the products runs at this machine's own pace.
            return Processor(name, 1 << 40, 6e9, operation_seconds, False, {"float32": speed.matrix_rates()})

        link = None if self.link is None else LinkRate(self.link)
        return HardwareProfile(
            hardware_id="throttled",
            description="a machine of known rates",
            measured_at="",
            host=processor("host", self.host if link else self.device),
            device=processor("device", self.device) if link else None,
            disk_read=LinkRate(self.disk),
            disk_write=LinkRate(self.disk),
            h2d=link,
            d2h=link,
            h2d_pageable=link,
            module_seconds=window_seconds,
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
            now = time.perf_counter()
            # What was queued already follows at once, however late the thread wakes that passes it on.
            begin = self._free_at if now - self._free_at < _LATE_SECONDS else now
            self._free_at = begin + nbytes / self._rate
            return self._free_at


def sleep_until(moment: float) -> None:
    while (left := moment - time.perf_counter()) > 0:
        time.sleep(left)


class _Pauses:
    """Short ones, of which many add up: what one was too long, the next are shorter."""

    def __init__(self) -> None:
        self._late_seconds = 0.0

    def until(self, moment: float) -> None:
        now = time.perf_counter()
        moment -= min(self._late_seconds, max(0.0, moment - now))
        if (left := moment - now) > 2 * _SLEEP_LATE_SECONDS:
            time.sleep(left - 2 * _SLEEP_LATE_SECONDS)
        while (now := time.perf_counter()) < moment:
            pass
        self._late_seconds = now - moment


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
    hardware_name = "throttled"
    torch_device = torch.device("cpu")
    shares_host_memory = False
    copy_link = "h2d"
    workspace_bytes = 0
    emulated_dtypes = frozenset()

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

    def copy_in(self, copies, after=(), name=""):
        event = PacedEvent()
        self._asked.put((copies, after, event, name))
        return event

    def convert(self, work, after):
        after.synchronize()
        work()
        return self.record()

    def copy_out(self, target, source, name=""):
        unversioned(target).copy_(source)
        return self.record()

    def _copy_all(self) -> None:
        while True:
            copies, after, event, name = self._asked.get()
            for earlier in after:
                if earlier is not None:
                    earlier.synchronize()
            nbytes = sum(source.nbytes for _, source in copies)
            begun = time.perf_counter()
            until = self._pace.reserve(nbytes)
            with torch.inference_mode(False), torch.no_grad():
                for target, source in copies:
                    unversioned(target).copy_(source)
            sleep_until(until)
            self.ended.append(Copy(name, begun, time.perf_counter(), nbytes))
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
        patch("offload.runtime.machine.choose_engine", lambda sample: ThrottledEngine(rates.disk)),
        patch("offload.runtime.machine.PosixEngine", lambda: ThrottledEngine(rates.disk)),
    ):
        yield


@contextmanager
def paced_products(model: nn.Module, rates: Rates, plan: Plan) -> Iterator[None]:
    """Products with weights take as long as the rates say: what the plan gives to the host at the host's rate."""

    def within(name: str, keys: Sequence[str]) -> bool:
        return any(f"{name}.".startswith(f"{key}.") for key in keys)

    pauses, handles = _Pauses(), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            percent = (
                100
                if within(name, plan.weights.computed_on_host)
                else plan.weights.cpu_percent
                if within(name, plan.weights.cpu_gpu_split)
                else 0
            )
            host_rows = module.out_features * percent // 100
            handles += _pace_one(pauses, module, rates, host_rows, hops=within(name, plan.weights.cpu_gpu_split))
        elif name in plan.weights.computed_on_host:
            handles.append(module.register_forward_hook(partial(_hop, pauses, rates)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hop(pauses: _Pauses, rates: Rates, module: nn.Module, args, output) -> None:
    """What a layer works on crosses the link, and its result does: they are of one size."""
    assert rates.link is not None
    hidden = output if isinstance(output, torch.Tensor) else output[0]
    pauses.until(time.perf_counter() + 2 * hidden.nbytes / rates.link)


def _pace_one(pauses: _Pauses, module: nn.Linear, rates: Rates, host_rows: int, hops: bool) -> list:
    """Args: hops: what is computed on the host crosses the link, product by product."""
    shares = ((rates.host, host_rows), (rates.device, module.out_features - host_rows))
    begun = [0.0]

    def before(module: nn.Module, args) -> None:
        begun[0] = time.perf_counter()

    def after(module: nn.Module, args, output) -> None:
        rows = output.numel() // output.shape[-1]
        # This device computes before the host's eyes: one after the other.
        taken = sum(speed.product_seconds(rows, module.in_features * share) for speed, share in shares if share)
        if hops:
            assert rates.link is not None
            taken += 4 * rows * (module.in_features + host_rows) / rates.link
        pauses.until(begun[0] + taken)

    # Before all others, and inside of any window.
    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
