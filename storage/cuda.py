"""A CUDA card: one copy stream beside the stream that computes. The only file that names `torch.cuda`."""

from collections import deque
from dataclasses import dataclass

import torch

from storage.arena import HostBuffer
from storage.device import Event

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

    host_memory = False
    copy_link = "h2d"

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)
        self.name = str(self.torch_device)
        self._copies = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self._copy_spans: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._stall_spans: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self.copied_bytes = 0
        self._copy_seconds = 0.0
        self._stall_seconds = 0.0
        self._locked: set[int] = set()
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def allocate(self, nbytes: int) -> CudaBuffer:
        with torch.inference_mode(False):
            return CudaBuffer(torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device), nbytes)

    def lock_pages(self, buffer: object) -> bool:
        assert isinstance(buffer, HostBuffer)
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
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
            torch.cuda.cudart().cudaHostUnregister(buffer.address)  # type: ignore[no-untyped-call]

    def copy_in(self, target: torch.Tensor, source: torch.Tensor, after: Event | None) -> Event:
        begun, ended = _timed_event(), _timed_event()
        with torch.inference_mode(False), torch.cuda.stream(self._copies):
            if after is not None:
                assert isinstance(after, torch.cuda.Event)
                self._copies.wait_event(after)
            begun.record(self._copies)
            target.copy_(source, non_blocking=True)
            ended.record(self._copies)
        self._copy_spans.append((begun, ended))
        self.copied_bytes += source.nbytes
        return ended

    def copy_seconds(self) -> float:
        self._copy_seconds += _drain(self._copy_spans)
        return self._copy_seconds

    def record(self) -> Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.torch_device))
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        stream = torch.cuda.current_stream(self.torch_device)
        if event.query():  # type: ignore[no-untyped-call]
            return
        begun, ended = _timed_event(), _timed_event()
        begun.record(stream)
        stream.wait_event(event)
        ended.record(stream)
        self._stall_spans.append((begun, ended))
        if len(self._stall_spans) > _EVENTS_KEPT:
            self._stall_seconds += _drain(self._stall_spans)
        if len(self._copy_spans) > _EVENTS_KEPT:
            self._copy_seconds += _drain(self._copy_spans)

    def stall_seconds(self) -> float:
        self._stall_seconds += _drain(self._stall_spans)
        return self._stall_seconds

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        reusable = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return int(free + reusable)

    def peak_bytes(self) -> int | None:
        return int(torch.cuda.max_memory_allocated(self.torch_device))


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _drain(spans: deque[tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
    """Seconds of the spans at the front that are over; those still pending stay."""
    seconds = 0.0
    while spans and spans[0][1].query():  # type: ignore[no-untyped-call]
        begun, ended = spans.popleft()
        seconds += begun.elapsed_time(ended) / 1000
    return seconds
