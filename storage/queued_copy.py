"""A copy to a device that is not in its queue yet: what whoever asked for it waits for."""

import threading
import time

from offload.storage.arrival import Waits
from offload.storage.devices.base import Device, Event


class QueuedCopy:
    """Bytes whose copy a thread submits once they lie in staging memory.

    Args:
        link: what a wait for it is charged to.
        after: must be passed before anything is written to the target.
    """

    def __init__(self, device: Device, link: str, name: str, after: Event | None) -> None:
        self.name = name
        self.after = after
        self.cancelled = False
        self.error: BaseException | None = None
        self.copied: Event | None = None
        """The last of its copies."""
        self.issued = threading.Event()
        """Set once the copies are in the device's queue, or never will be."""
        self._device = device
        self._link = link

    def wait(self) -> Waits:
        """Block until the copies are in the device's queue, and have the device wait for them.

        Raises:
            Whatever bringing the bytes raised.
        """
        begun = time.perf_counter()
        self.issued.wait()
        waited = time.perf_counter() - begun
        if self.error is not None:
            raise self.error
        assert self.copied is not None
        self._device.wait(self.copied)
        return {self._link: waited}

    def cancel(self) -> None:
        """Wait until nothing writes to the target any more."""
        self.cancelled = True
        self.issued.wait()
        if self.copied is not None:
            self.copied.synchronize()
