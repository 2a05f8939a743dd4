"""Blocks of weights on the device: for as long as their module computes, or for the whole session."""

from collections.abc import Sequence

import torch

from offload.model.homes import ParameterHome
from offload.runtime.block_reads import BlockRead
from offload.runtime.block_sources import BlockSource, views_of
from offload.storage.blocks import BlockKey
from offload.storage.codecs.weights import Source
from offload.storage.devices.base import DeviceBuffer


class StreamedBlock:
    """A block that passes through the slots."""

    def __init__(self, key: BlockKey, homes: Sequence[ParameterHome], source: BlockSource) -> None:
        self.key = key
        self.homes = list(homes)
        self.source = source
        self._offsets = list(source.offsets)
        self._views: dict[int, list[torch.Tensor]] = {}

    @property
    def brought_now(self) -> tuple[tuple[int, int], ...] | None:
        """Which values a load that starts now brings, changed ones too; None if it brings none of these."""
        changed = [home for home in self.homes if home.modified]
        if not changed or not all(self.source.brings(home) for home in changed):
            return None
        return tuple((home.parameter._version, home.parameter.data_ptr()) for home in self.homes)

    def bind(self, first_slot: int, region: torch.Tensor, complete: bool) -> None:
        """Point the parameters into the slot.

        Args:
            complete: the slot holds what was changed, too.
        """
        if first_slot not in self._views:
            self._views[first_slot] = views_of(self.homes, self._offsets, region)
        for home, view in zip(self.homes, self._views[first_slot], strict=True):
            home.bind(view, complete)

    def unbind(self) -> None:
        for home in self.homes:
            home.unbind()

    def forget_slots(self) -> None:
        """The slots are others from now on."""
        self._views.clear()

    def drop(self, home: ParameterHome) -> None:
        """Leave one parameter to the user; its bytes still come along."""
        index = self.homes.index(home)
        del self.homes[index], self._offsets[index]
        self._views.clear()


class ResidentBlock:
    """A block that stays on the device for the whole session.

    Args:
        buffer: its memory; None where the parameters already lie in fitting memory.
        read: brings the bytes into the buffer; None where they are there.
    """

    def __init__(
        self,
        key: BlockKey,
        homes: Sequence[ParameterHome],
        buffer: DeviceBuffer | None = None,
        offsets: Sequence[int] = (),
        read: BlockRead | None = None,
    ) -> None:
        self.key = key
        self.homes = list(homes)
        self.nbytes = sum(home.tensor.nbytes for home in homes) if buffer is None else buffer.nbytes
        self.in_place = buffer is None
        self.digests: list[bytes] = []
        """What came for each home from disk; empty where it came from elsewhere."""
        self._read = read
        self._views = [] if buffer is None else views_of(self.homes, offsets, buffer.tensor)
        if read is None:
            self._bind()

    @property
    def sources(self) -> list[Source]:
        """What of files it is made of; empty once it is there, or where it comes from elsewhere."""
        return [] if self._read is None else self._read.sources

    def arrive(self) -> None:
        """Wait for the bytes; the parameters lie in them from then on. What was written to them meanwhile is kept.

        Raises:
            ReadError: if the disk failed; it is tried again the next time.
        """
        if self._read is not None:
            self.digests = self._read.wait().digests
            self._read = None
            for home in self.homes:
                home.notice_changes()
            self._bind()

    def stop(self) -> None:
        """Nothing is on its way any more; what had not arrived is used from where it was."""
        if self._read is not None:
            self._read.cancel()
            self._read = None

    def drop(self, home: ParameterHome) -> None:
        """Leave one parameter to the user."""
        index = self.homes.index(home)
        del self.homes[index]
        if self._views:
            del self._views[index]
        if self.digests:
            del self.digests[index]

    def _bind(self) -> None:
        for home, view in zip(self.homes, self._views, strict=bool(self._views)):
            home.bind(view)

    def give_up(self) -> None:
        """Free the device memory; the parameters are at home afterwards, with the values that they have now."""
        for home in self.homes:
            if not self.in_place and home.tensor.data_ptr() == home.parameter.data_ptr():
                home.tensor = home.parameter.data.to("cpu", copy=True)
            home.unbind()
