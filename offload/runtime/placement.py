"""Brings a model's parameters to where the plan wants them, and back in the end."""

import os
import tempfile
import warnings
from collections.abc import Callable, Sequence

import psutil
import torch
from torch import nn

from offload.model.blocks import Structure, Unit
from offload.model.homes import FileMaps, ParameterHome
from offload.runtime.weights import (
    BlockSource,
    DirectSource,
    GatheredTable,
    HostSource,
    ResidentBlock,
    StagedSource,
    StreamedBlock,
    packed_offsets,
)
from scheduler.plan import Plan
from storage.arena import HostBuffer
from storage.block_file import BlockFile, BlockFileWriter, check_folder
from storage.blocks import BlockKey, FileRange
from storage.device import Device
from storage.errors import DiskFull, gib
from storage.ledger import MemoryLedger
from storage.reader import DiskReader
from storage.staging import StagedReader

_STAGING_BUFFERS = 3

Progress = Callable[[str, int, int], None]
"""Told (what, done bytes, total bytes) during long steps."""


class Placement:
    """The parameters of one model, on their tiers.

    Args:
        device: what computes.
        reader: the disk.
        device_ledger, host_ledger: charged for what is held; the same ledger where the device's memory is the host's.
        known: where tensors lie that no file mapping tells of, by name.
        disk_dir: where tensors are spilled that lie in no file; None for the system's temporary folder.
    """

    def __init__(
        self,
        device: Device,
        reader: DiskReader,
        device_ledger: MemoryLedger,
        host_ledger: MemoryLedger,
        disk_ledger: MemoryLedger,
        known: dict[str, FileRange],
        disk_dir: str | None,
        progress: Progress,
    ) -> None:
        self.resident: dict[BlockKey, ResidentBlock] = {}
        self.streamed: dict[BlockKey, StreamedBlock] = {}
        self.tables: dict[BlockKey, GatheredTable] = {}
        self.outside: list[ParameterHome] = []
        """Parameters that no block holds; on the device throughout."""
        self.fallbacks: list[str] = []
        self._device = device
        self._reader = reader
        self._device_ledger = device_ledger
        self._host_ledger = host_ledger
        self._disk_ledger = disk_ledger
        self._known = dict(known)
        self._disk_dir = disk_dir
        self._progress = progress
        self._maps = FileMaps()
        self._spills: list[BlockFile] = []
        self._locked: list[HostBuffer] = []
        self._staged: StagedReader | None = None
        self._homes: dict[str, ParameterHome] = {}

    def source_of(self, name: str, parameter: nn.Parameter) -> FileRange | None:
        """The file that holds the parameter's present values; None if only memory does."""
        if name not in self._known:
            found = self._maps.locate(parameter.data)
            if found is None:
                return None
            self._known[name] = found
        return self._known[name]

    def slot_bytes(self, unit: Unit) -> int:
        """What the unit's block will take in the slots."""
        ranges = [self.source_of(name, parameter) for name, parameter in unit.parameters.items()]
        if self._device.host_memory and all(item is not None for item in ranges):
            return self._reader.plan([item for item in ranges if item is not None]).slot_bytes
        return unit.block.packed_bytes + 2 * 4096 * len(unit.parameters)

    def apply(self, structure: Structure, plan: Plan) -> None:
        """Place every parameter. What leaves memory goes first, so that there is room for what comes.

        Raises:
            DiskFull, ReadError: nothing was changed then that `restore` does not undo.
        """
        units = {unit.key: unit for unit in structure.units if unit.parameters}
        for name, parameter in structure.pinned.items():
            self._hold_outside(name, parameter)
        in_host = set(plan.in_host_memory)
        if not self._device.host_memory:
            for key in plan.in_host_memory:
                self.streamed[key] = self._to_host_memory(units[key])
        self._spill([units[key] for key in (*plan.streamed, *plan.gathered) if key not in in_host])
        from_disk = [units[key] for key in plan.streamed if key not in in_host]
        self._open_staging(from_disk)
        for unit in from_disk:
            self.streamed[unit.key] = StreamedBlock(unit.key, self._homes_of(unit), self._disk_source(unit))
        for key in plan.gathered:
            self.tables[key] = self._table(units[key])
        done = 0
        for key in plan.resident:
            self._progress("loading", done, plan.resident_bytes)
            self.resident[key] = self._to_device(units[key])
            done += self.resident[key].nbytes
        self.streamed = {key: self.streamed[key] for key in plan.streamed}
        self._progress("loading", plan.resident_bytes, plan.resident_bytes)

    def give_up(self, keys: Sequence[BlockKey], units: dict[BlockKey, Unit]) -> None:
        """Turn resident blocks into streamed ones."""
        for key in keys:
            block = self.resident.pop(key)
            block.give_up()
            self._device_ledger.release("resident weights", block.nbytes)
        self._spill([units[key] for key in keys])
        for key in keys:
            unit = units[key]
            if unit.gathers and not any(unit.key in other.uses for other in units.values() if other is not unit):
                self.tables[key] = self._table(unit)
                continue
            self._open_staging([unit])
            self.streamed[key] = StreamedBlock(key, self._homes_of(unit), self._disk_source(unit))

    def hold_added(self, name: str, parameter: nn.Parameter) -> None:
        """A parameter that came while the session was running: it is on the device from now on."""
        self._hold_outside(name, parameter)

    def homes(self) -> list[ParameterHome]:
        return list(self._homes.values())

    def forget(self, home: ParameterHome) -> None:
        """The user gave this parameter another shape: it is theirs from now on."""
        self._homes.pop(home.name)
        for block in (*self.streamed.values(), *self.resident.values()):
            if home in block.homes:
                block.drop(home)

    def restore(self) -> None:
        """Give every parameter its own memory back, with the values that it has now."""
        anonymous = sum(home.tensor.nbytes for home in self._homes.values() if home.original is None)
        if anonymous > psutil.virtual_memory().available:
            warnings.warn(
                f"leaving the context reads {gib(anonymous)} of weights back into memory, of which "
                f"{gib(psutil.virtual_memory().available)} is free",
                stacklevel=4,
            )
        for home in self._homes.values():
            home.restore()
        for block in self.resident.values():
            self._device_ledger.release("resident weights", block.nbytes)
        self.resident.clear()
        self.streamed.clear()
        self.tables.clear()
        self.outside.clear()
        self._homes.clear()

    def close(self) -> None:
        """Give files, threads and page locks back. After `restore`."""
        if self._staged is not None:
            self._staged.close()
        for buffer in self._locked:
            self._device.unlock_pages(buffer)
        for spill in self._spills:
            spill.close()
        self._locked.clear()
        self._spills.clear()

    def _homes_of(self, unit: Unit) -> list[ParameterHome]:
        return [self._home(name, parameter) for name, parameter in unit.parameters.items()]

    def _home(self, name: str, parameter: nn.Parameter) -> ParameterHome:
        if name not in self._homes:
            self._homes[name] = ParameterHome(name, parameter, parameter.data, parameter.data)
        return self._homes[name]

    def _hold_outside(self, name: str, parameter: nn.Parameter) -> None:
        home = self._home(name, parameter)
        self._device_ledger.charge("resident weights", home.tensor.nbytes)
        if not self._device.host_memory:
            home.bind(home.tensor.to(self._device.torch_device))
        elif home.tensor.data_ptr() % 64:
            home.bind(home.tensor.clone())
        self.outside.append(home)

    def _to_device(self, unit: Unit) -> ResidentBlock:
        homes = self._homes_of(unit)
        if self._device.host_memory and all(
            self.source_of(home.name, home.parameter) is None and home.tensor.data_ptr() % 64 == 0 for home in homes
        ):
            self._device_ledger.charge("resident weights", sum(home.tensor.nbytes for home in homes))
            return ResidentBlock(unit.key, homes, None, [])
        offsets, nbytes = packed_offsets(homes)
        if self._device.host_memory:
            buffer, offsets = self._read_to_host(unit, self._device_ledger, "resident weights")
            return ResidentBlock(unit.key, homes, buffer, offsets)
        self._device_ledger.charge("resident weights", nbytes)
        return self._copy_to_device(unit, homes, offsets, nbytes)

    def _copy_to_device(self, unit: Unit, homes: list[ParameterHome], offsets: list[int], nbytes: int) -> ResidentBlock:
        staged, places = self._read_to_host(unit, self._host_ledger, "staging")
        buffer = self._device.allocate(nbytes)
        for home, source, target in zip(homes, places, offsets, strict=True):
            size = home.tensor.nbytes
            self._device.copy_in(buffer.tensor[target : target + size], staged.tensor[source : source + size], None).synchronize()
        self._host_ledger.release("staging", staged.nbytes)
        block = ResidentBlock(unit.key, homes, buffer, offsets)
        for home in homes:
            if self.source_of(home.name, home.parameter) is None:
                # The only copy is on the device now: the old one is released at once.
                home.original = None
                home.tensor = torch.empty(0)
        return block

    def _to_host_memory(self, unit: Unit) -> StreamedBlock:
        """Into page-locked memory of the block's own, from where one copy brings it to the device."""
        homes = self._homes_of(unit)
        buffer, offsets = self._read_to_host(unit, self._host_ledger, "streamed weights")
        if self._device.lock_pages(buffer):
            self._locked.append(buffer)
        elif not any("page-locked" in sentence for sentence in self.fallbacks):
            self.fallbacks.append("CPU memory could not be page-locked: copies to the device are slower and do not overlap")
        for home, offset in zip(homes, offsets, strict=True):
            view = buffer.own_storage(offset, home.tensor.nbytes).view(home.tensor.dtype).view(home.tensor.shape)
            if self.source_of(home.name, home.parameter) is None:
                home.original = None
            home.tensor = view
            home.parameter.data = view
        return StreamedBlock(unit.key, homes, HostSource(self._device, buffer, offsets, unit.block.nbytes))

    def _read_to_host(self, unit: Unit, ledger: MemoryLedger, category: str) -> tuple[HostBuffer, list[int]]:
        """The unit's tensors in one new host buffer, and where each lies in it."""
        homes = self._homes_of(unit)
        ranges = [self.source_of(home.name, home.parameter) for home in homes]
        if all(item is not None and not home.modified for item, home in zip(ranges, homes, strict=True)):
            on_disk = [item for item in ranges if item is not None]
            landing = self._reader.plan(on_disk)
            buffer = self._charged_buffer(landing.slot_bytes, ledger, category)
            self._reader.read(on_disk, landing, buffer.memory[: landing.slot_bytes]).wait()
            return buffer, list(landing.offsets)
        offsets, nbytes = packed_offsets(homes)
        buffer = self._charged_buffer(nbytes, ledger, category)
        for home, offset in zip(homes, offsets, strict=True):
            size = home.tensor.nbytes
            buffer.tensor[offset : offset + size].view(home.tensor.dtype).view(home.tensor.shape).copy_(home.tensor)
        return buffer, offsets

    def _charged_buffer(self, nbytes: int, ledger: MemoryLedger, category: str) -> HostBuffer:
        # Whole pages, as the buffer takes them.
        ledger.charge(category, -(-nbytes // 4096) * 4096)
        return HostBuffer(nbytes)

    def _disk_source(self, unit: Unit) -> BlockSource:
        ranges = [self._known[name] for name in unit.parameters]
        landing = self._reader.plan(ranges)
        if self._staged is None:
            return DirectSource(self._reader, ranges, landing)
        return StagedSource(self._staged, self._device, ranges, landing)

    def _table(self, unit: Unit) -> GatheredTable:
        home = self._homes_of(unit)[0]
        return GatheredTable(unit.key, home, self._reader, self._known.get(home.name))

    def _open_staging(self, units: Sequence[Unit]) -> None:
        if self._device.host_memory or self._staged is not None or not units:
            return
        largest = max(self._reader.plan([self._known[name] for name in unit.parameters]).slot_bytes for unit in units)
        buffers = [self._charged_buffer(largest, self._host_ledger, "staging") for _ in range(_STAGING_BUFFERS)]
        self._locked += [buffer for buffer in buffers if self._device.lock_pages(buffer)]
        self._staged = StagedReader(self._reader, self._device, buffers)

    def _spill(self, units: Sequence[Unit]) -> None:
        """Write to disk what only memory holds, releasing it tensor by tensor."""
        homes = [
            home
            for unit in units
            for home in self._homes_of(unit)
            if home.modified or self.source_of(home.name, home.parameter) is None
        ]
        if not homes:
            return
        folder = self._disk_dir or tempfile.gettempdir()
        check_folder(folder)
        total = sum(home.tensor.nbytes for home in homes)
        free = os.statvfs(folder)
        if free.f_bavail * free.f_frsize < total:
            raise DiskFull(
                f"{gib(total)} of weights must be spilled to {folder}, which has {gib(free.f_bavail * free.f_frsize)} free; "
                "free some space, or name another folder with --disk (disk_dir=)"
            )
        writer = BlockFileWriter(folder)
        try:
            done = 0
            for home in homes:
                self._progress("spilling", done, total)
                writer.add(home.name, home.parameter.data)
                done += home.tensor.nbytes
                # A stand-in of the right shape that holds no memory, until the file can be mapped.
                home.tensor = torch.empty(1, dtype=home.tensor.dtype).expand(home.tensor.shape)
                home.parameter.data = home.tensor
                home.original = None
        except DiskFull:
            self._take_over(writer.so_far(), homes)
            for home in homes:
                home.restore()
            writer.abandon()
            raise
        self._progress("spilling", total, total)
        spill = writer.finish()
        self._spills.append(spill)
        self._disk_ledger.charge("spilled weights", writer.nbytes)
        self._take_over(spill, homes)
        self._known.update({home.name: spill.tensors[home.name].range for home in homes})

    def _take_over(self, spill: BlockFile, homes: Sequence[ParameterHome]) -> None:
        """Make the file's tensors the homes of the parameters."""
        for home in homes:
            if home.name in spill.tensors:
                home.tensor = spill.view(home.name)
                home.parameter.data = home.tensor
                home.modified = False
                home.version = home.parameter._version
