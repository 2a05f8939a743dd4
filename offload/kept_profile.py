"""The profile of this machine that an earlier measurement kept."""

import hashlib
import json
import os
import tempfile

import psutil
import torch

from offload.scheduler.hardware import HardwareProfile
from offload.storage.cache_folder import cache_folder
from offload.storage.devices.base import Device
from offload.storage.devices.cpu import CpuDevice
from offload.storage.errors import ProfileError

_REVISION = 5
"""The version of what is measured, and how: a profile that was measured otherwise is not found any more."""


def suits(profile: HardwareProfile, device: Device) -> bool:
    """True if the profile describes a machine that computes where `device` does."""
    return (profile.device is None) == device.shares_host_memory


def hardware_id(device: Device, disk_dir: str) -> str:
    """Changes with the processor, its cores, the memory, the card, the disk, and torch's version."""
    facts = [
        CpuDevice().hardware_name,
        torch.get_num_threads(),
        psutil.virtual_memory().total >> 30,
        device.hardware_name,
        os.stat(disk_dir).st_dev,
        torch.__version__,
        _REVISION,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def kept_profile(device: Device, disk_dir: str | None = None) -> HardwareProfile | None:
    """The profile of this machine that an earlier measurement kept, or the file `$OFFLOAD_HARDWARE`; None if there is none.

    Raises:
        ProfileError: if it was broken by hand.
    """
    described = os.environ.get("OFFLOAD_HARDWARE")
    if described:
        profile = HardwareProfile.load(described)
        return profile if suits(profile, device) else None
    folder = disk_dir or tempfile.gettempdir()
    if not os.path.isdir(folder):
        return None
    identity = hardware_id(device, folder)
    path = cache_folder() / f"hardware-{identity}.json"
    if not path.exists():
        return None
    profile = HardwareProfile.load(path)
    if profile.hardware_id != identity:
        raise ProfileError(f"{path} is a profile of other hardware ({profile.hardware_id}); delete it, it is made again")
    return profile
