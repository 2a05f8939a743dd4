"""What a computation depends on beside its arguments: the generators' states, and torch's settings of a thread."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


class RngState:
    """The generators' states as they are now.

    Args:
        device: that computes, beside the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._device = device if device.type != "cpu" else None
        self._state = None if self._device is None else torch.get_device_module(device).get_rng_state(device)

    def restore(self) -> None:
        """Have the generators go on from there."""
        torch.set_rng_state(self._cpu)
        if self._device is not None:
            torch.get_device_module(self._device).set_rng_state(self._state, self._device)

    @contextmanager
    def replay(self) -> Iterator[None]:
        """The same random numbers inside; outside it goes on as before."""
        now = RngState(self._device or torch.device("cpu"))
        self.restore()
        try:
            yield
        finally:
            now.restore()


class AutocastState:
    """Whether and to what torch casts in this thread."""

    def __init__(self, device: torch.device) -> None:
        kinds = dict.fromkeys(("cpu", device.type))
        self._casts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]

    @contextmanager
    def replay(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, dtype, enabled in self._casts:
                stack.enter_context(torch.autocast(kind, dtype, enabled))
            yield
