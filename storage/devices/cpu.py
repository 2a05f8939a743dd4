"""The CPU as the device that computes: its memory is the host's."""

import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch

from offload.storage.devices.base import Copy, Event, unversioned
from offload.storage.host_buffer import HostBuffer


class Done:
    """The event of work that was over when it was submitted."""

    def synchronize(self) -> None:
        pass


DONE = Done()


def _model_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


class CpuDevice:
    """Computes where the disk's bytes land: no copy between host and device, and every call is synchronous."""

    name = "cpu"
    hardware_name = _model_name()
    torch_device = torch.device("cpu")
    shares_host_memory = True
    copy_link = "ram"
    workspace_bytes = 0
    emulated_dtypes: frozenset[torch.dtype] = frozenset()

    def allocate(self, nbytes: int) -> HostBuffer:
        # Its pages are made by whoever fills them: the threads that read, for slots.
        return HostBuffer(nbytes, prefault=False)

    def lock_pages(self, buffer: object) -> bool:
        return False

    def unlock_pages(self, buffer: object) -> None:
        pass

    def copy_in(
        self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Sequence[Event | None] = (), name: str = ""
    ) -> Event:
        for target, source in copies:
            unversioned(target).copy_(source)
        return DONE

    def convert(self, work: Callable[[], None], after: Event) -> Event:
        after.synchronize()
        work()
        return DONE

    def copy_out(self, target: torch.Tensor, source: torch.Tensor, name: str = "") -> Event:
        unversioned(target).copy_(source)
        return DONE

    def ended_copies(self) -> list[Copy]:
        return []

    def record(self) -> Event:
        return DONE

    def wait(self, event: Event) -> None:
        event.synchronize()

    def ended_stalls(self) -> list[tuple[float, float]]:
        return []

    def synchronize(self) -> None:
        pass

    def free_bytes(self) -> int:
        return int(psutil.virtual_memory().available)

    def peak_bytes(self) -> int | None:
        return None
