"""A CUDA card: two copy streams beside the stream that computes. The only file that names `torch.cuda`."""

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from offload.storage.devices.base import Copy, Event, unversioned
from offload.storage.errors import DeviceFull, gib
from offload.storage.host_buffer import HostBuffer

_EVENTS_KEPT = 4096
"""Timed events are read in batches: reading one that is still pending would stop the host."""
_ANCHOR_MILLISECONDS = 60_000.0
"""Times between events are float32 milliseconds: after hours they would be whole milliseconds."""
_WORKSPACES: dict[int, int] = {}
"""Bytes of each card's cuBLAS, which keeps them as long as the process lives."""
_PORTABLE = 1
"""`cudaHostRegisterPortable`: locked for every card of the process."""


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
        # Since Ampere; torch computes with it on older cards all the same, by way of float32.
        native = torch.cuda.get_device_capability(self.torch_device) >= (8, 0)
        self.emulated_dtypes = frozenset[torch.dtype]() if native else frozenset((torch.bfloat16,))
        self._index = index
        # torch's own streams and events: those of `torch.cuda` ask Python for the present device at each call.
        self._copies = torch.Stream(self.torch_device)
        self._copies_out = torch.Stream(self.torch_device)
        self._pending_copies: deque[tuple[str, torch.Event, torch.Event, int]] = deque()
        self._ended_copies: list[Copy] = []
        self._pending_stalls: deque[tuple[torch.Event, torch.Event]] = deque()
        self._ended_stalls: list[tuple[float, float]] = []
        self._locked: set[int] = set()
        self._awaited: dict[int, torch.Event] = {}
        """The event that each stream waited for last."""
        self.workspace_bytes = _WORKSPACES.setdefault(index, _workspace_bytes(self.torch_device))
        # What an ended session left to the garbage collector is not there when this one's peak is measured.
        gc.collect()
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        # Where the card's clock and the host's meet.
        self._anchor = self._timed_event()
        self._anchor.record(self._computing)
        self._anchor.synchronize()
        self._anchor_seconds = time.perf_counter()

    @property
    def _computing(self) -> torch.Stream:
        """The stream that this thread computes on."""
        return torch.accelerator.current_stream(self._index)

    @contextmanager
    def _on(self, stream: torch.Stream) -> Iterator[None]:
        """What this thread submits goes to `stream`, and is no part of what autograd sees."""
        before = self._computing
        with torch.inference_mode(False), torch.no_grad():
            torch.accelerator.set_stream(stream)
            try:
                yield
            finally:
                torch.accelerator.set_stream(before)

    def _timed_event(self) -> torch.Event:
        return torch.Event(self.torch_device, enable_timing=True)

    def allocate(self, nbytes: int) -> CudaBuffer:
        with torch.inference_mode(False):
            try:
                tensor = torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)
            except torch.OutOfMemoryError as error:
                raise DeviceFull(self._refusal(nbytes)) from error
            buffer = CudaBuffer(tensor, nbytes)
        # torch hands out memory that was freed in the compute stream's order: kernels queued there may still write to it.
        self._copies.wait_stream(self._computing)
        return buffer

    def _refusal(self, nbytes: int) -> str:
        reserved = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return (
            f"{gib(nbytes)} of {self.name} ({self.hardware_name}) were asked for, and {gib(self.free_bytes())} is free by now, "
            f"of which torch holds {gib(reserved)} in pieces: another program, a display perhaps, took memory since the budget "
            "was made. Give a smaller gpu_memory; against many pieces, set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
        )

    def lock_pages(self, buffer: object) -> bool:
        assert isinstance(buffer, HostBuffer)
        # In the card's own context: registering in the present device's would make one on another card.
        with torch.cuda.device(self.torch_device):
            if int(torch.cuda.cudart().cudaHostRegister(buffer.address, buffer.nbytes, _PORTABLE)) == 0:
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

    def copy_in(
        self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Sequence[Event | None] = (), name: str = ""
    ) -> Event:
        begun, ended = self._timed_event(), self._timed_event()
        with self._on(self._copies):
            for event in dict.fromkeys(after):
                if event is not None:
                    assert isinstance(event, torch.Event)
                    self._copies.wait_event(event)
            begun.record(self._copies)
            for target, source in copies:
                unversioned(target).copy_(source, non_blocking=True)
            ended.record(self._copies)
        self._pending_copies.append((name, begun, ended, sum(source.nbytes for _, source in copies)))
        return ended

    def convert(self, work: Callable[[], None], after: Event) -> Event:
        assert isinstance(after, torch.Event)
        ended = torch.Event(self.torch_device)
        # In line with the copies: what is converted takes a small part of the time that its copy took.
        with self._on(self._copies):
            self._copies.wait_event(after)
            work()
            ended.record(self._copies)
        return ended

    def copy_out(self, target: torch.Tensor, source: torch.Tensor, name: str = "") -> Event:
        computed, ended = torch.Event(self.torch_device), torch.Event(self.torch_device)
        computed.record(self._computing)
        with self._on(self._copies_out):
            self._copies_out.wait_event(computed)
            unversioned(target).copy_(source, non_blocking=True)
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
        event = torch.Event(self.torch_device)
        event.record(self._computing)
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, torch.Event)
        stream = self._computing
        if self._awaited.get(stream.stream_id) is event:
            # Copies that were submitted together share one.
            return
        self._awaited[stream.stream_id] = event
        if event.query():
            # It is over, and costs nothing; said all the same, for whoever checks the order.
            stream.wait_event(event)
            return
        begun, ended = self._timed_event(), self._timed_event()
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

    def _seconds_at(self, event: torch.Event) -> float:
        """The moment of an event that is over on the host's clock."""
        since = self._anchor.elapsed_time(event)
        seconds = self._anchor_seconds + since / 1000
        if since > _ANCHOR_MILLISECONDS:
            self._anchor, self._anchor_seconds = event, seconds
        return seconds

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def free_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self.torch_device)
        reserved = torch.cuda.memory_reserved(self.torch_device)
        # What torch may take at all (`set_per_process_memory_fraction`).
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(self.torch_device))
        return max(0, min(free, allowed - reserved) + reserved - torch.cuda.memory_allocated(self.torch_device))

    def peak_bytes(self) -> int | None:
        return int(torch.cuda.max_memory_allocated(self.torch_device))


def _workspace_bytes(device: torch.device) -> int:
    """What cuBLAS takes for itself when it is first used; nothing more, where it was."""
    with torch.inference_mode():
        matrix = torch.ones(64, 64, device=device)
        bias = torch.ones(64, device=device)
        before = torch.cuda.memory_allocated(device)
        for dtype in (torch.float32, torch.float16):
            torch.nn.functional.linear(matrix.to(dtype), matrix.to(dtype), bias.to(dtype))
            matrix.to(dtype).mm(matrix.to(dtype))
        return torch.cuda.memory_allocated(device) - before
