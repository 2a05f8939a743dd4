"""A model's buffers, on a device with memory of its own."""

import torch
from torch import nn

from offload.storage.devices.base import Device
from offload.storage.ledger import MemoryLedger


class DeviceBuffers:
    """Moves every buffer to the device, non-persistent ones too, and back when undone. None is ever made again.

    Args:
        ledger: charged for them.
    """

    def __init__(self, model: nn.Module, device: Device, ledger: MemoryLedger) -> None:
        self._model = model
        self._ledger = ledger
        self._before: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        self._nbytes = sum(buffer.nbytes for buffer in model.buffers())
        ledger.charge("buffers", self._nbytes)
        if device.shares_host_memory:
            return
        for buffer in model.buffers():
            home = buffer.data
            buffer.data = home.to(device.torch_device)
            self._before.append((buffer, home, buffer._version))

    def undo(self) -> None:
        for buffer, home, version in self._before:
            buffer.data = home if buffer._version == version else buffer.data.to(home.device)
        if self._before:
            # A buffer that was registered inside the context was made on the device.
            home_device = self._before[0][1].device
            for buffer in self._model.buffers():
                buffer.data = buffer.data.to(home_device)
        self._before.clear()
        self._ledger.release("buffers", self._nbytes)
