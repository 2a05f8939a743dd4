"""Finds the device that a user names."""

import re
import sys

import torch

from offload.storage.devices.base import Device
from offload.storage.devices.cpu import CpuDevice
from offload.storage.errors import ConfigError, PlatformError


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
