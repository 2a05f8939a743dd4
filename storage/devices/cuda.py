"""A CUDA card: one copy stream beside the stream that computes. The only file that names `torch.cuda`."""

import time
from collections import deque
from dataclasses import dataclass

import torch

from offload.storage.devices.base import Copy, Event, unversioned
from offload.storage.host_buffer import HostBuffer

_EVENTS_KEPT = 4096
"""Timed events are read in batches: reading one that is still pending would stop the host."""


@dataclass(slots=True)
class CudaBuffer:
    """Device memory from torch's caching allocator; its allocations start at multiples of 512 bytes."""

    tensor: torch.Tensor
    nbytes: int


class CudaDevice:
    """Copies on a stream of its own; nothing here blocks the host but `synchronize`.

    Args:
        index: which card.
    """

    shares_host_memory = False
    copy_link = "h2d"

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)
        self.name = str(self.torch_device)
        self.hardware_name = torch.cuda.get_device_name(self.torch_device)
        self._copies = torch.cuda.Stream(self.torch_device)
        self._copies_out = torch.cuda.Stream(self.torch_device)
        self._pending_copies: deque[tuple[str, torch.cuda.Event, torch.cuda.Event, int]] = deque()
        self._ended_copies: list[Copy] = []
        self._pending_stalls: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._ended_stalls: list[tuple[float, float]] = []
        self._locked: set[int] = set()
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        # Where the card's clock and the host's meet.
        self._zero = _timed_event()
        self._zero.record(torch.cuda.current_stream(self.torch_device))
        self._zero.synchronize()
        self._zero_seconds = time.perf_counter()

    def allocate(self, nbytes: int) -> CudaBuffer:
        with torch.inference_mode(False):
            buffer = CudaBuffer(torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device), nbytes)
        # torch hands out memory that was freed in the compute stream's order: kernels queued there may still write to it.
        self._copies.wait_stream(torch.cuda.current_stream(self.torch_device))
        return buffer

    def lock_pages(self, buffer: object) -> bool:
        assert isinstance(buffer, HostBuffer)
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(buffer.address, buffer.nbytes, 0)) == 0:
            self._locked.add(buffer.address)
            return True
        # The refusal stays behind as the last CUDA error and would be raised by the next unrelated call.
        try:
            torch.cuda.synchronize(self.torch_device)
            torch.empty(1, device=self.torch_device).add_(1)
        except RuntimeError:
            pass
        return False

    def unlock_pages(self, buffer: object) -> None:
        assert isinstance(buffer, HostBuffer)
        if buffer.address in self._locked:
            self._locked.remove(buffer.address)
            torch.cuda.cudart().cudaHostUnregister(buffer.address)

    def copy_in(self, target: torch.Tensor, source: torch.Tensor, after: Event | None, name: str = "") -> Event:
        begun, ended = _timed_event(), _timed_event()
        with torch.inference_mode(False), torch.cuda.stream(self._copies):
            if after is not None:
                assert isinstance(after, torch.cuda.Event)
                self._copies.wait_event(after)
            begun.record(self._copies)
            unversioned(target).copy_(source, non_blocking=True)
            ended.record(self._copies)
        self._pending_copies.append((name, begun, ended, source.nbytes))
        return ended

    def copy_out(self, target: torch.Tensor, source: torch.Tensor, name: str = "") -> Event:
        computed = torch.cuda.Event()
        computed.record(torch.cuda.current_stream(self.torch_device))
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(self._copies_out):
            self._copies_out.wait_event(computed)
            unversioned(target).copy_(source, non_blocking=True)
            ended = torch.cuda.Event()
            ended.record(self._copies_out)
        return ended

    def ended_copies(self) -> list[Copy]:
        self._drain_copies()
        ended, self._ended_copies = self._ended_copies, []
        return ended

    def _drain_copies(self) -> None:
        while self._pending_copies and self._pending_copies[0][2].query():
            name, begun, ended, nbytes = self._pending_copies.popleft()
            begin_seconds = self._seconds_at(begun)
            self._ended_copies.append(Copy(name, begin_seconds, begin_seconds + begun.elapsed_time(ended) / 1000, nbytes))

    def record(self) -> Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.torch_device))
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        stream = torch.cuda.current_stream(self.torch_device)
        if event.query():
            return
        begun, ended = _timed_event(), _timed_event()
        begun.record(stream)
        stream.wait_event(event)
        ended.record(stream)
        self._pending_stalls.append((begun, ended))
        if len(self._pending_stalls) > _EVENTS_KEPT:
            self._drain_stalls()
        if len(self._pending_copies) > _EVENTS_KEPT:
            self._drain_copies()

    def ended_stalls(self) -> list[tuple[float, float]]:
        self._drain_stalls()
        ended, self._ended_stalls = self._ended_stalls, []
        return ended

    def _drain_stalls(self) -> None:
        while self._pending_stalls and self._pending_stalls[0][1].query():
            begun, ended = self._pending_stalls.popleft()
            begin_seconds = self._seconds_at(begun)
            self._ended_stalls.append((begin_seconds, begin_seconds + begun.elapsed_time(ended) / 1000))

    def _seconds_at(self, event: torch.cuda.Event) -> float:
        """An event's moment on the host's clock."""
        return self._zero_seconds + float(self._zero.elapsed_time(event)) / 1000

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        reusable = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return int(free + reusable)

    def peak_bytes(self) -> int | None:
        return int(torch.cuda.max_memory_allocated(self.torch_device))


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
