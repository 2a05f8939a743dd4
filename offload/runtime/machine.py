"""What sessions run on: a host with its disk and memory, and one device. Opened once, handed on as one, shared perhaps."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from offload.budgets import Budgets, resolve_budgets
from offload.config import Progress, parse_bytes
from offload.runtime.clock import PassClock
from offload.runtime.meters import CopyMeter, Meters
from offload.runtime.notes import Notes
from offload.runtime.page_locked import PageLockedMemory
from offload.runtime.recorder import Recorder
from offload.runtime.shared_lock import SharedLock
from offload.storage.blocks import Tier
from offload.storage.devices.base import Device
from offload.storage.devices.resolve import resolve_device
from offload.storage.errors import BudgetTooSmall, ConfigError, gib
from offload.storage.io_engines.base import ReadEngine
from offload.storage.io_engines.kvikio import choose_engine
from offload.storage.io_engines.posix import PosixEngine
from offload.storage.ledger import MemoryLedger
from offload.storage.reader import DiskReader
from offload.storage.transfer import Link

_READ_THREADS = min(4, max(2, os.cpu_count() or 2))
"""No more than processors: each faults pages in, and whoever plans or computes meanwhile has to have one."""
_WRITE_THREADS = 2


@dataclass(frozen=True, slots=True)
class Host:
    """Disk and CPU memory.

    Attributes:
        engine: reads files.
        reads, writes: the disk's queues.
        reader: reads weights, through `reads`.
        ledger: counts CPU memory; the device's own where the CPU computes.
        memory: buffers in CPU memory that the device copies from.
        disk_ledger: counts what is written.
        recorder: keeps the spans of all that happens.
        notes: what is to be told beside results.
        disk_dir: where files are made; None for the folder of temporary files.
        progress: called with (what, done, total) during long steps.
    """

    engine: ReadEngine
    reads: Link
    writes: Link
    reader: DiskReader
    ledger: MemoryLedger
    memory: PageLockedMemory
    disk_ledger: MemoryLedger
    recorder: Recorder
    notes: Notes
    disk_dir: str | None
    progress: Progress


@dataclass(frozen=True, slots=True)
class Machine:
    """A host and one device that computes.

    Attributes:
        ledger: counts the device's memory.
        lock: held by whoever computes: one forward at a time.
        clock: charges time to the phases of one session.
        meters: what tiers hold and links moved.
    """

    host: Host
    device: Device
    ledger: MemoryLedger
    lock: SharedLock
    copies: CopyMeter
    clock: PassClock
    meters: Meters

    @property
    def notes(self) -> Notes:
        return self.host.notes

    @property
    def discrete(self) -> bool:
        """The device has memory of its own."""
        return not self.device.shares_host_memory

    def free_budgets(self, gpu_memory: str | int | None = None, cpu_memory: str | int | None = None) -> Budgets:
        """The budgets of one more session: what is asked for of what is free, else all of that.

        Raises:
            ConfigError: if a GPU budget is asked for on a machine whose CPU computes.
            BudgetTooSmall: if more is asked for than is free.
        """
        if gpu_memory is not None and not self.discrete:
            raise ConfigError(
                "gpu_memory was given, and the machine's device is the CPU, which has one budget: give cpu_memory only"
            )
        device_name = "gpu_memory" if self.discrete else "cpu_memory"
        asked = parse_bytes(gpu_memory if self.discrete else cpu_memory, device_name)
        device_bytes = _of_what_is_free(device_name, asked, self.ledger)
        if not self.discrete:
            return Budgets(device_bytes, None)
        host_bytes = _of_what_is_free("cpu_memory", parse_bytes(cpu_memory, "cpu_memory"), self.host.ledger)
        return Budgets(device_bytes, host_bytes, self.device.workspace_bytes)

    def for_session(self, budgets: Budgets, disk_dir: str | None, progress: Progress) -> "Machine":
        """The machine as one session has it: the same links, device and lock; ledgers, clock and notes of its own."""
        host, memory = self.host, self.host.recorder.memory
        ledger = MemoryLedger(self.ledger.tier, budgets.device_bytes, memory, parent=self.ledger)
        host_ledger = ledger
        if budgets.host_bytes is not None:
            host_ledger = MemoryLedger(Tier.CPU, budgets.host_bytes, memory, parent=host.ledger)
        disk_ledger = MemoryLedger(Tier.DISK, None, memory, parent=host.disk_ledger)
        notes = Notes()
        own = replace(
            host,
            ledger=host_ledger,
            memory=PageLockedMemory(self.device, host_ledger, notes),
            disk_ledger=disk_ledger,
            notes=notes,
            disk_dir=disk_dir,
            progress=progress,
        )
        clock = PassClock(host.recorder, asynchronous=self.device.torch_device.type == "cuda")
        meters = Meters(self.device, self.copies, ledger, host_ledger, disk_ledger)
        return replace(self, host=own, ledger=ledger, clock=clock, meters=meters)


def _of_what_is_free(name: str, asked: int | None, ledger: MemoryLedger) -> int:
    free = ledger.free_bytes
    assert free is not None
    if asked is not None and asked > free:
        raise BudgetTooSmall(
            f"{name}={gib(asked)} was asked for, and {gib(free)} of the machine's {gib(ledger.budget_bytes or 0)} is free; "
            "give less, or open the machine with more",
            asked,
        )
    return free if asked is None else asked


@contextmanager
def machine_of(
    device: Device,
    budgets: Budgets,
    disk_dir: str | None = None,
    sample: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[Machine]:
    """Open a machine for as long as the context lasts.

    Args:
        sample: a file that will be read, to choose what reads it.
    """
    with ExitStack() as stack:
        recorder = Recorder()
        # On the CPU, reads go straight to where they are computed with: nothing to gain from kvikio.
        engine = PosixEngine() if device.shares_host_memory else choose_engine(sample)
        stack.callback(engine.close)
        reads = _link("disk", _READ_THREADS, recorder.span, stack)
        writes = _link("disk writes", _WRITE_THREADS, recorder.span, stack)
        ledger = MemoryLedger(Tier.CPU if device.shares_host_memory else Tier.DEVICE, budgets.device_bytes)
        host_ledger = ledger if budgets.host_bytes is None else MemoryLedger(Tier.CPU, budgets.host_bytes)
        disk_ledger = MemoryLedger(Tier.DISK, None)
        notes = Notes()
        host = Host(
            engine,
            reads,
            writes,
            DiskReader(engine, reads),
            host_ledger,
            PageLockedMemory(device, host_ledger, notes),
            disk_ledger,
            recorder,
            notes,
            disk_dir,
            progress,
        )
        copies = CopyMeter(device, recorder)
        clock = PassClock(recorder, asynchronous=device.torch_device.type == "cuda")
        meters = Meters(device, copies, ledger, host_ledger, disk_ledger)
        yield Machine(host, device, ledger, SharedLock(), copies, clock, meters)


def _link(name: str, threads: int, span: Callable[..., None], stack: ExitStack) -> Link:
    link = Link(name, threads, span)
    stack.callback(link.close)
    return link


@contextmanager
def open_machine(
    device: str = "auto",
    gpu_memory: str | int | None = None,
    cpu_memory: str | int | None = None,
    disk_dir: str | None = None,
) -> Iterator[Machine]:
    """Open a machine that several sessions share: `with open_machine(...) as machine: offload(model, machine=machine)`.

    The budgets are those of all its sessions together, and one forward at a time computes.

    Args:
        device: what computes: `auto`, `cuda`, `cuda:N` or `cpu`.
        gpu_memory: budget on the GPU, `"8GiB"` or bytes, with the default of `offload`.
        cpu_memory: budget of CPU memory, likewise.
        disk_dir: where files are made.
    """
    chosen = resolve_device(device)
    with machine_of(chosen, resolve_budgets(chosen, gpu_memory, cpu_memory, 0).check_free(chosen), disk_dir) as machine:
        yield machine
