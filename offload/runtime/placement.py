"""Brings a model's parameters to where the plan wants them, and back in the end."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import psutil
import torch
from torch import nn

from offload.model.blocks import HasParameters, StoredSize, Structure, Unit, divisible_modules, estimated_size
from offload.model.homes import FileMaps, ParameterHome
from offload.model.quantised.weights import size_of_sources
from offload.runtime.block_reads import BlockReads
from offload.runtime.block_sources import (
    BlockSource,
    DirectSource,
    DividedSource,
    EncodedSource,
    HostSource,
    StagedSource,
    packed_offsets,
    views_of,
)
from offload.runtime.early_reads import RESIDENT, EarlyReads
from offload.runtime.embedding_rows import EmbeddingTable
from offload.runtime.host_weights import STREAMED, HostWeights
from offload.runtime.hybrid_linear import HybridLinear, split_rows
from offload.runtime.loading_blocks import LoadingBlocks
from offload.runtime.machine import Machine
from offload.runtime.row_upload import RowUpload
from offload.runtime.spilling import spill
from offload.runtime.weights import ResidentBlock, StreamedBlock
from offload.scheduler.plan import Plan
from offload.storage.block_file import BlockFile, spill_folder
from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES, BlockKey, FileRange, align_up
from offload.storage.codecs.weights import Source
from offload.storage.digest import digest
from offload.storage.errors import gib
from offload.storage.staging import StagedReader

_FROM_MEMORY = (HostSource, DividedSource, EncodedSource)


class Placement:
    """The parameters of one model, on their tiers.

    Args:
        known: where tensors lie that no file mapping tells of, by name.
    """

    def __init__(self, machine: Machine, known: Mapping[str, Source]) -> None:
        self.on_resident: Callable[[Sequence[ParameterHome], Sequence[bytes]], None] = lambda homes, digests: None
        self.early: EarlyReads | None = None
        """Reads that were begun before it was known what is resident."""
        self.resident: dict[BlockKey, ResidentBlock] = {}
        self.streamed: dict[BlockKey, StreamedBlock] = {}
        self.tables: dict[BlockKey, EmbeddingTable] = {}
        self.on_host: dict[BlockKey, list[ParameterHome]] = {}
        """Blocks that the CPU computes."""
        self.cpu_gpu_split: dict[BlockKey, list[HybridLinear]] = {}
        """Products that the device and the CPU share, by block."""
        self.outside: list[ParameterHome] = []
        """Parameters that no block holds; on the device throughout."""
        self._notes = machine.notes
        self._memory = machine.host.memory
        self._device = machine.device
        self._reader = machine.host.reader
        self._device_ledger = machine.ledger
        self.host_ledger = machine.host.ledger
        self._disk_ledger = machine.host.disk_ledger
        self._known: dict[str, Source] = dict(known)
        self._disk_dir, self._progress = machine.host.disk_dir, machine.host.progress
        self._maps = FileMaps()
        self._spills: list[BlockFile] = []
        self._staged: StagedReader | None = None
        self._homes: dict[str, ParameterHome] = {}
        self._tables_in_memory: set[BlockKey] = set()
        self._rows = RowUpload(self._device, self._memory)
        self._reads = BlockReads(self._reader, self._memory, self.source_of)
        self._host = HostWeights(self._reader, self._reads, self._memory, self.host_ledger, self.source_of)
        self.loading = LoadingBlocks(partial(self._progress, "loading"))

    @property
    def homes(self) -> Iterable[ParameterHome]:
        """All that the session knows of."""
        return self._homes.values()

    def source_of(self, name: str, parameter: nn.Parameter) -> Source | None:
        """What in a file holds the parameter's present values; None if only memory does."""
        if name not in self._known and (found := self._maps.locate(parameter.data)) is not None:
            self._known[name] = found
        return self._known.get(name)

    def size_of(self, unit: Unit) -> StoredSize:
        """What the unit's block will take."""
        found = [item for item in self._sources_of(unit) if item is not None]
        whole = len(found) == len(unit.parameters)
        return size_of_sources(found, self._reader.engine.unit_bytes) if whole else estimated_size(unit)

    def apply(self, structure: Structure, plan: Plan) -> None:
        """Place every parameter. What leaves memory goes first, so that there is room for what comes.

        Raises:
            DiskFull, ReadError: nothing was changed then that `restore` does not undo.
        """
        self._maps = FileMaps()
        units = {unit.key: unit for unit in structure.units if unit.parameters}
        if self.early is not None:
            self.early.drop(but={self._sources_of(units[key]) for key in plan.weights.resident})
        for name, parameter in structure.always_resident.items():
            self._hold_outside(name, parameter)
        in_host = {*plan.weights.in_host_memory, *plan.weights.tables_in_host_memory}
        for key in plan.weights.in_host_memory:
            percent = plan.weights.cpu_percent if key in plan.weights.cpu_gpu_split else 0
            self.streamed[key] = self._to_host_memory(units[key], percent)
        for key in plan.weights.computed_on_host:
            self.on_host[key] = self._to_cpu(units[key], "weights computed on the CPU")
        for key in plan.weights.tables_in_host_memory:
            self._to_cpu(units[key], "embedding tables")
            self._tables_in_memory.add(key)
        self.spill([units[key] for key in (*plan.weights.streamed, *plan.weights.row_fetched) if key not in in_host])
        from_disk = [units[key] for key in plan.weights.streamed if key not in in_host]
        self._open_staging(from_disk, plan.weights.staging_count)
        for unit in from_disk:
            self.streamed[unit.key] = StreamedBlock(unit.key, self.homes_of(unit), self._disk_source(unit))
        for key in (*plan.weights.streamed, *plan.weights.row_fetched):
            if units[key].fetches_rows:
                self.tables[key] = self._table(units[key])
        self.streamed = {key: self.streamed[key] for key in plan.weights.streamed}
        resident = frozenset(plan.weights.resident)
        self.loading.on_arrival = lambda block: self.on_resident(block.homes, block.digests)
        self._load([unit for unit in structure.units if unit.key in resident])

    def give_up(self, plan: Plan, structure: Structure) -> None:
        """Turn the blocks in memory that `plan` streams or gathers into such ones."""
        self._maps, units = FileMaps(), {unit.key: unit for unit in structure.units if unit.parameters}
        given_up = [units[key] for key in (*plan.weights.streamed, *plan.weights.row_fetched) if key in self.resident]
        for unit in given_up:
            block = self.resident.pop(unit.key)
            block.give_up()
            self._device_ledger.release(RESIDENT, block.nbytes)
        if self._device.shares_host_memory:
            for key, source in [(key, block.source) for key, block in self.streamed.items()]:
                if isinstance(source, EncodedSource) and key not in plan.weights.in_host_memory:
                    self._host.release(source, STREAMED)
                    given_up.append(units[key])
        self.spill(given_up)
        self._open_staging([unit for unit in given_up if unit.key in plan.weights.streamed], max(1, plan.weights.staging_count))
        for unit in given_up:
            if unit.key in plan.weights.streamed:
                self.streamed[unit.key] = StreamedBlock(unit.key, self.homes_of(unit), self._disk_source(unit))
            if unit.fetches_rows:
                self.tables[unit.key] = self._table(unit)
        self.streamed = {key: self.streamed[key] for key in plan.weights.streamed}

    def expect_changes(self) -> None:
        """From now on the homes of what is trained have the values."""
        for home in self._homes.values():
            if home.parameter.requires_grad and not home.trained:
                home.expect_changes()

    def home_of(self, parameter: nn.Parameter) -> ParameterHome | None:
        """Where the parameter lives; None if the session does not know it."""
        return next((home for home in self._homes.values() if home.parameter is parameter), None)

    def range_of(self, home: ParameterHome) -> Source | None:
        """Where a file holds the values that the parameter has now; None if only memory does."""
        return None if home.modified else self.source_of(home.name, home.parameter)

    def settle_in_memory(self, unit: Unit, category: str) -> None:
        """A unit whose weights were streamed from a file lives in CPU memory from now on.

        Raises:
            BudgetExceeded: if there is no room for it.
        """
        homes = self.homes_of(unit)
        if unit.key not in self._tables_in_memory:
            buffer, offsets = self._host.settle(homes, category)
        for home in homes:
            home.accept_changes()
            self._known.pop(home.name, None)
        if unit.key in self.tables:
            self.tables[unit.key] = self._table(unit)
        if unit.key in self.streamed:
            self.streamed[unit.key] = StreamedBlock(unit.key, homes, HostSource(unit.key, self._memory, buffer, offsets))

    def settle_in_file(self, unit: Unit, places: Mapping[str, tuple[FileRange, torch.Tensor]]) -> None:
        """Some parameters of a unit lie in a file that this process writes.

        Args:
            places: where, and a view of the bytes, by name.
        """
        homes = self.homes_of(unit)
        self._tables_in_memory.discard(unit.key)
        for home in homes:
            if home.name in places:
                place, view = places[home.name]
                self._known[home.name] = place
                self._reader.engine.open(place.path, own=True)
                if unit.key not in self.resident:
                    home.tensor = home.parameter.data = view
                    home.original, home.modified, home.version = None, False, home.parameter._version
        if unit.key in self.tables:
            self.tables[unit.key] = self._table(unit)
        if unit.key in self.streamed:
            self.streamed[unit.key] = StreamedBlock(unit.key, homes, self._disk_source(unit))

    def as_placed(self, plan: Plan) -> Plan:
        """The plan with what became of the blocks that were given up."""
        in_host = tuple(key for key, block in self.streamed.items() if isinstance(block.source, _FROM_MEMORY))
        return replace(plan, weights=replace(plan.weights, in_host_memory=in_host))

    def added_bytes(self, model: nn.Module) -> int:
        """Bytes of the parameters that `adopt` will hold on the device."""
        known = {id(home.parameter) for home in self._homes.values() if home.parameter.shape == home.tensor.shape}
        return sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in known)

    def adopt(self, model: nn.Module) -> None:
        """Hold on the device what came while the session was running: new parameters, and those of another shape."""
        for home in list(self._homes.values()):
            if home.parameter.shape != home.tensor.shape:
                self._forget(home)
        known = {id(home.parameter) for home in self._homes.values()}
        for name, parameter in model.named_parameters():
            if id(parameter) not in known:
                self._hold_outside(name, parameter)

    def _forget(self, home: ParameterHome) -> None:
        """The user gave this parameter another shape: it is theirs from now on."""
        self._homes.pop(home.name)
        self.tables = {key: table for key, table in self.tables.items() if home not in table.homes}
        for homes in self.on_host.values():
            if home in homes:
                homes.remove(home)
        blocks: list[StreamedBlock | ResidentBlock] = [*self.streamed.values(), *self.resident.values()]
        for block in blocks:
            if home in block.homes:
                block.drop(home)

    def restore(self) -> None:
        """Give every parameter its own memory back, with the values that it has now."""
        anonymous = sum(home.parameter.nbytes for home in self._homes.values() if home.original is None)
        if anonymous > psutil.virtual_memory().available:
            warnings.warn(
                f"leaving the context reads {gib(anonymous)} of weights back into memory, of which "
                f"{gib(psutil.virtual_memory().available)} is free",
                stacklevel=4,
            )
        self.loading.stop()
        for home in self._homes.values():
            home.restore()
        for block in self.resident.values():
            self._device_ledger.release(RESIDENT, block.nbytes)
        self.resident.clear()
        self.streamed.clear()
        self.tables.clear()
        self.on_host.clear()
        self.cpu_gpu_split.clear()
        self.outside.clear()
        self._homes.clear()

    def close(self) -> None:
        """Give files, threads and page locks back. After `restore`."""
        if self._staged is not None:
            self._staged.close()
        self._rows.close()
        self._memory.close()
        for file in self._spills:
            file.close()
        self._spills.clear()

    def homes_of(self, unit: HasParameters) -> list[ParameterHome]:
        return [self._home(name, parameter) for name, parameter in unit.parameters.items()]

    def _home(self, name: str, parameter: nn.Parameter) -> ParameterHome:
        if name not in self._homes:
            self._homes[name] = ParameterHome(name, parameter, parameter.data, parameter.data)
        return self._homes[name]

    def _hold_outside(self, name: str, parameter: nn.Parameter) -> None:
        home = self._home(name, parameter)
        self._device_ledger.charge(RESIDENT, home.tensor.nbytes)
        if not self._device.shares_host_memory:
            home.bind(home.tensor.to(self._device.torch_device))
        elif not home.is_aligned:
            home.bind(home.tensor.clone())
        self.outside.append(home)

    def _load(self, units: Sequence[Unit]) -> None:
        """Bring the resident blocks, in the order of use: to a card at once, into this process's memory while others go on."""
        load, done = self._in_host_memory if self._device.shares_host_memory else self._copy_to_device, 0
        for unit in units:
            self.resident[unit.key] = load(unit, self.homes_of(unit))
            done += unit.block.nbytes
            if not self.loading:
                self._progress("loading", done, sum(unit.block.nbytes for unit in units))

    def _sources_of(self, unit: Unit) -> tuple[Source | None, ...]:
        return tuple(self.source_of(name, parameter) for name, parameter in unit.parameters.items())

    def _in_host_memory(self, unit: Unit, homes: Sequence[ParameterHome]) -> ResidentBlock:
        if all(self.source_of(home.name, home.parameter) is None and home.is_aligned for home in homes):
            self._device_ledger.charge(RESIDENT, sum(home.tensor.nbytes for home in homes))
            return ResidentBlock(unit.key, homes)
        read = None if self.early is None else self.early.take(self._sources_of(unit))
        read = read or self._reads.start_in_background(homes, self._device_ledger, RESIDENT)
        block = ResidentBlock(unit.key, homes, read.buffer, read.offsets, read)
        self.loading.add(block)
        return block

    def _copy_to_device(self, unit: Unit, homes: list[ParameterHome]) -> ResidentBlock:
        offsets, packed_bytes = packed_offsets(homes)
        nbytes = align_up(packed_bytes, BLOCK_ALIGNMENT_BYTES)
        self._device_ledger.charge(RESIDENT, nbytes)
        buffer = self._device.allocate(nbytes)
        on_disk = [self.source_of(home.name, home.parameter) for home in homes]
        sources = [home.tensor for home in homes]
        if all(on_disk):
            staged = self._reads.start(homes, self.host_ledger, "staging").wait()
            sources = views_of(homes, staged.offsets, staged.buffer.tensor)
        for view, source in zip(views_of(homes, offsets, buffer.tensor), sources, strict=True):
            self._device.copy_in([(view, source)], name=unit.key).synchronize()
        if all(on_disk):
            self.host_ledger.release("staging", staged.buffer.nbytes)
        block = ResidentBlock(unit.key, homes, buffer, offsets)
        for home, stored in zip(homes, on_disk, strict=True):
            if stored is None:
                # The only copy is on the device now: the old one is released at once.
                home.original = None
                home.tensor = home.parameter.data
            else:
                self.on_resident([home], [digest(home.parameter.data)])
        return block

    def _to_host_memory(self, unit: Unit, cpu_percent: int) -> StreamedBlock:
        """Into memory of the block's own, from where one copy brings it to the device.

        Args:
            cpu_percent: of the rows of its products, those that stay for the CPU to compute with.
        """
        homes = self.homes_of(unit)
        if not cpu_percent:
            return StreamedBlock(unit.key, homes, self._host.source(unit.key, homes, STREAMED))
        buffer, offsets = self._host.settle(homes, STREAMED)
        self.cpu_gpu_split[unit.key] = split_rows(divisible_modules(unit), self._homes, cpu_percent)
        return StreamedBlock(unit.key, homes, DividedSource(unit.key, self._memory, buffer, offsets, homes))

    def _to_cpu(self, unit: Unit, category: str) -> list[ParameterHome]:
        """Into ordinary memory, from where the CPU computes with it, or takes rows."""
        homes = self.homes_of(unit)
        self._host.settle(homes, category, locked=False)
        return homes

    def _disk_source(self, unit: Unit) -> BlockSource:
        load_plan = self._reader.plan([self._known[name] for name in unit.parameters])
        if self._staged is None:
            return DirectSource(unit.key, self._reader, load_plan)
        return StagedSource(unit.key, self._staged, load_plan)

    def _table(self, unit: Unit) -> EmbeddingTable:
        (home,) = self.homes_of(unit)
        source = None if unit.key in self._tables_in_memory else self._known.get(home.name)
        return EmbeddingTable(unit.key, home, self._reader, source, self._rows)

    def _open_staging(self, units: Sequence[Unit], count: int) -> None:
        if self._device.shares_host_memory or self._staged is not None or not units:
            return
        largest = max(self._reader.plan([self._known[name] for name in unit.parameters]).stored.slot_bytes for unit in units)
        self._staged = self._memory.open_staging(self._reader, largest, count)

    def spill(self, units: Sequence[HasParameters]) -> None:
        """Write to disk what only memory holds, releasing it tensor by tensor."""
        homes = [
            home
            for unit in units
            for home in self.homes_of(unit)
            if home.modified or self.source_of(home.name, home.parameter) is None
        ]
        if not homes:
            return
        folder = self._disk_dir or spill_folder()
        file, nbytes = spill(homes, folder, self._progress)
        self._spills.append(file)
        self._disk_ledger.charge("spilled weights", nbytes)
        if self._disk_dir is None:
            self._notes.warn(f"{gib(nbytes)} of weights that no file holds were spilled to {folder} (disk_dir=)")
        self._known.update({home.name: file.tensors[home.name].range for home in homes})
