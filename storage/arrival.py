"""Bytes on their way: what whoever asked for them waits for."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from offload.storage.devices.base import Device, Event

Waits = dict[str, float]
"""Seconds that the caller stood still, by the name of the link that it waited for."""


class Arrival(Protocol):
    """Bytes on their way to a place in memory."""

    def wait(self) -> Waits:
        """Return when compute may use the bytes: at once, where the device itself waits for their copy.

        Raises:
            Whatever bringing them raised.
        """
        ...

    def cancel(self) -> None:
        """Return when nothing is written to the place any more."""
        ...


@dataclass(frozen=True, slots=True)
class CopyArrival:
    """Copies that the device waits for by itself."""

    device: Device
    copies: list[Event]

    def wait(self) -> Waits:
        for copied in self.copies:
            self.device.wait(copied)
        return {}

    def cancel(self) -> None:
        for copied in self.copies:
            copied.synchronize()


DECODING = "decoding"
"""What whoever decodes waits for, beside links."""


class DecodedArrival:
    """Bytes that are decoded by whoever needs them: with all threads, which compute neither before nor meanwhile.

    Decoding in a thread beside compute would take longer: with fewer cores than threads each waits for the other.

    Args:
        stored: on their way; `ARRIVED` if they are there.
        decode: run once.
    """

    def __init__(self, stored: Arrival, decode: Callable[[], None]) -> None:
        self._stored = stored
        self._decode: Callable[[], None] | None = decode

    def wait(self) -> Waits:
        waits = dict(self._stored.wait())
        if self._decode is not None:
            begun = time.perf_counter()
            self._decode()
            self._decode = None
            waits[DECODING] = time.perf_counter() - begun
        return waits

    def cancel(self) -> None:
        self._stored.cancel()


class _Nothing:
    """There is nothing to wait for: the bytes are there."""

    def wait(self) -> Waits:
        return {}

    def cancel(self) -> None:
        pass


ARRIVED = _Nothing()


@dataclass(frozen=True, slots=True)
class JointArrival:
    """Several that are waited for as one."""

    arrivals: Sequence[Arrival]

    def wait(self) -> Waits:
        waits: Waits = {}
        for arrival in self.arrivals:
            for link, seconds in arrival.wait().items():
                waits[link] = waits.get(link, 0.0) + seconds
        return waits

    def cancel(self) -> None:
        for arrival in self.arrivals:
            arrival.cancel()
