"""What the runtime asks of the device that computes."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch


class Event(Protocol):
    """A point in a device's order of work."""

    def synchronize(self) -> None:
        """Block this thread until the point is passed."""


class Copy(NamedTuple):
    """A copy from host to device that has ended; its times are those of `time.perf_counter()`."""

    name: str
    begin_seconds: float
    end_seconds: float
    nbytes: int


class DeviceBuffer(Protocol):
    """Memory of the device, as bytes.

    Attributes:
        tensor: uint8 [nbytes] on the device; starts at a multiple of 4,096 bytes.
        nbytes: its size.
    """

    tensor: torch.Tensor
    nbytes: int


class Device(Protocol):
    """A device that computes, with memory of its own or with the host's.

    Attributes:
        name: `cpu`, `cuda:0`.
        hardware_name: what it is, by its maker.
        torch_device: where its tensors live.
        shares_host_memory: True if its memory is the host's, so that the disk writes straight into it.
        copy_link: the name of the link from host memory to it.
        workspace_bytes: what the libraries of its kernels keep of its memory, for the thread that opened it.
        emulated_dtypes: those that its hardware does not compute in.
    """

    name: str
    hardware_name: str
    torch_device: torch.device
    shares_host_memory: bool
    copy_link: str
    workspace_bytes: int
    emulated_dtypes: frozenset[torch.dtype]

    def allocate(self, nbytes: int) -> DeviceBuffer:
        """Memory for weights; given back when the last reference to it goes.

        Raises:
            DeviceFull: if something else holds it.
        """

    def lock_pages(self, buffer: object) -> bool:
        """Page-lock a `HostBuffer` so that copies from it are asynchronous; False if that is not to be had."""

    def unlock_pages(self, buffer: object) -> None:
        """Undo `lock_pages`."""

    def copy_in(
        self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Sequence[Event | None] = (), name: str = ""
    ) -> Event:
        """Start copying host bytes to the device, once all of `after` are passed; the event marks the end of all copies.

        The version that autograd sees of a target's memory stays: other threads compute with other parts of it meanwhile.

        Args:
            copies: (target, source) of each.
            name: of the block, for the trace.
        """

    def convert(self, work: Callable[[], None], after: Event) -> Event:
        """Run `work`, which changes in place what copies brought, once `after` is passed; the event marks its end.

        Compute goes on meanwhile.
        """

    def copy_out(self, target: torch.Tensor, source: torch.Tensor, name: str = "") -> Event:
        """Start copying from the device to host memory, once what was submitted so far is done.

        `source` must stay as it is until the event is passed; so must `target`, which holds the values then.
        """

    def ended_copies(self) -> list[Copy]:
        """The copies that have ended since the last call, in order."""

    def record(self) -> Event:
        """The point at which all compute submitted so far is done."""

    def wait(self, event: Event) -> None:
        """Compute submitted from now on starts after `event`."""

    def ended_stalls(self) -> list[tuple[float, float]]:
        """When compute stood still in `wait`, since the last call: begin and end, by `time.perf_counter()`."""

    def synchronize(self) -> None:
        """Block until everything submitted is done."""

    def free_bytes(self) -> int:
        """Device memory that nobody holds."""

    def peak_bytes(self) -> int | None:
        """The most that this process held at once, by the device's own count; None where it keeps none."""


def unversioned(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory with a version counter of its own.

    All views of a slot's memory share one counter. A copy in a link's thread would raise it while a forward elsewhere saves
    a tensor of another slot, which autograd takes for a change of that tensor. What a slot holds is told by its generation.
    """
    return tensor.data


_ROUNDS = 3


def copy_bytes_per_second(device: Device, target: torch.Tensor, source: torch.Tensor) -> float:
    """The best of a few copies of `source` (uint8, host) to `target` (uint8, device) of the same size."""
    best = float("inf")
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        device.copy_in([(target, source)], name="measurement").synchronize()
        best = min(best, time.perf_counter() - begun)
    return source.nbytes / best
