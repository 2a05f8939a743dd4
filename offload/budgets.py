"""How many bytes the runtime may hold, as asked for or as the machine has them free."""

import os
from dataclasses import dataclass

import psutil

from offload.config import parse_bytes
from offload.storage.devices.base import Device
from offload.storage.errors import BudgetTooSmall, ConfigError, gib
from offload.storage.process_memory import mapped_bytes, process_bytes

HOST_MARGIN_BYTES = 256 << 20
"""Left free of a default CPU budget, for what the process still allocates by itself."""


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
