"""What a user may ask for, read and checked before anything is loaded."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from offload.storage.devices.base import Device
from offload.storage.devices.cpu import CpuDevice
from offload.storage.errors import BudgetTooSmall, ConfigError, PlatformError, gib
from offload.storage.process_memory import mapped_bytes, process_bytes

IDENTICAL, ROUNDING = "identical", "rounding"
EXACTNESS = (IDENTICAL, ROUNDING)

_UNITS = {"": 1, "b": 1, "k": 1000, "kb": 1000, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12, "tb": 10**12,
          "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}  # fmt: skip

Progress = Callable[[str, int, int], None]
"""A function that is called with (what, done bytes, total bytes) during long steps."""

HOST_MARGIN_BYTES = 256 << 20
"""Left free of a default CPU budget, for what the process still allocates by itself."""


def parse_bytes(text: str | int | None, name: str = "size") -> int | None:
    """`"12GiB"`, `"8 GB"`, `4096` to bytes; None stays None.

    Raises:
        ConfigError: if it cannot be read, or is not positive.
    """
    if text is None:
        return None
    if isinstance(text, int) and not isinstance(text, bool):
        count = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text) if isinstance(text, str) else None
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise ConfigError(f'{name}={text!r} is not a size; write it like "8GiB", "500MB", or as a number of bytes')
        count = int(float(match[1]) * unit)
    if count <= 0:
        raise ConfigError(f"{name}={text!r} must be more than nothing")
    return count


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes that the runtime may hold.

    Attributes:
        device_bytes: on the device that computes.
        host_bytes: in CPU memory; None if that is the device's own.
        workspace_bytes: of the device's, what its libraries take.
    """

    device_bytes: int
    host_bytes: int | None
    workspace_bytes: int = 0

    def check_free(self, device: Device) -> "Budgets":
        """Raise ConfigError if the device has less to give by now: a display, or another program, takes and gives back."""
        if not device.shares_host_memory and self.device_bytes > _free_bytes(device):
            raise ConfigError(
                f"gpu_memory={gib(self.device_bytes)} was asked for, and {gib(_free_bytes(device))} of {device.name} "
                f"({device.hardware_name}) is free; give less, close what else uses the card, or leave gpu_memory out for "
                "90% of what is free"
            )
        return self


def resolve_device(name: str) -> Device:
    """The device called `name`: `auto`, `cpu`, `cuda`, `cuda:1`.

    Raises:
        ConfigError: if there is no such device.
        PlatformError: anywhere but on Linux.
    """
    if sys.platform != "linux":
        raise PlatformError(f"offload runs on Linux only (O_DIRECT, statx, /proc); this is {sys.platform}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return CpuDevice()
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise ConfigError(f"device={name!r} is not known; give auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise ConfigError(f"device={name!r} was asked for, and torch {torch.__version__} sees no CUDA card; give device='cpu'")
    index = int(match[1] or 0)
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r} was asked for, and there are {torch.cuda.device_count()} CUDA cards")
    from offload.storage.devices.cuda import CudaDevice

    return CudaDevice(index)


def resolve_budgets(device: Device, gpu_memory: str | int | None, cpu_memory: str | int | None, held_bytes: int) -> Budgets:
    """The budgets that were asked for, else the defaults.

    Args:
        held_bytes: of a model that is in CPU memory already: the runtime takes it over, so it counts as free.

    Raises:
        ConfigError: if a GPU budget is given for the CPU.
        BudgetTooSmall: if nothing is left for a default.
    """
    gpu_bytes, cpu_bytes = parse_bytes(gpu_memory, "gpu_memory"), parse_bytes(cpu_memory, "cpu_memory")
    if device.shares_host_memory:
        if gpu_bytes is not None:
            raise ConfigError("gpu_memory was given, and the device is the CPU, which has one budget: give cpu_memory only")
        return Budgets(cpu_bytes if cpu_bytes is not None else default_host_bytes(held_bytes), None)
    device_bytes = gpu_bytes if gpu_bytes is not None else _free_bytes(device) * 9 // 10
    host_bytes = cpu_bytes if cpu_bytes is not None else default_host_bytes(held_bytes)
    return Budgets(device_bytes, host_bytes, device.workspace_bytes)


def _free_bytes(device: Device) -> int:
    """Count the workspaces as free: they are there already."""
    return device.free_bytes() + device.workspace_bytes


def default_host_bytes(held_bytes: int) -> int:
    """The least of available RAM and what the control group allows, less a margin."""
    room = int(psutil.virtual_memory().available) + held_bytes
    limit = cgroup_limit_bytes()
    if limit is not None:
        room = min(room, _room_in_group(limit, held_bytes))
    if room <= HOST_MARGIN_BYTES:
        raise BudgetTooSmall(
            f"{gib(max(room, 0))} of CPU memory is free, of which {gib(HOST_MARGIN_BYTES)} is left to the process; "
            "close other programs, or set cpu_memory yourself",
            HOST_MARGIN_BYTES,
        )
    return room - HOST_MARGIN_BYTES


def _room_in_group(limit_bytes: int, held_bytes: int) -> int:
    """What a control group leaves beside the process and its code: mapped pages count there, and are read again if evicted."""
    return limit_bytes - process_bytes() - mapped_bytes() + held_bytes


def what_it_risks(budgets: Budgets, held_bytes: int) -> str | None:
    """A sentence for a budget of CPU memory that leaves the process's own code no room in its control group; None for others.

    Args:
        held_bytes: of a model that is in CPU memory already.
    """
    limit = cgroup_limit_bytes()
    asked = budgets.device_bytes if budgets.host_bytes is None else budgets.host_bytes
    if limit is None or asked <= (room := _room_in_group(limit, held_bytes)):
        return None
    return (
        f"cpu_memory={gib(asked)} is more than the {gib(max(room, 0))} that the control group's limit of {gib(limit)} leaves "
        "beside Python and torch: their code is evicted and read again, which may take seconds; give less"
    )


def cgroup_limit_bytes() -> int | None:
    """The memory limit of this process's control group or of one above it (v2 and v1); None without one."""
    limits = []
    try:
        with open("/proc/self/cgroup") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return None
    for _, controllers, path in groups:
        if not controllers:
            limits += _limits_along("/sys/fs/cgroup", path, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits_along("/sys/fs/cgroup/memory", path, "memory.limit_in_bytes")
    return min(limits, default=None)


def _limits_along(root: str, path: str, name: str) -> list[int]:
    limits = []
    parts = [part for part in path.split("/") if part]
    for depth in range(len(parts) + 1):
        try:
            with open(os.path.join(root, *parts[:depth], name)) as file:
                text = file.read().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 1 << 60:
            limits.append(int(text))
    return limits
