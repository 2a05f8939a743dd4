"""The context manager. It owns the lifetime of everything that a session takes."""

import importlib
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from html import escape
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from offload.collector import held_collector
from offload.config import Progress
from offload.kept_profile import kept_profile, suits
from offload.model.homes import FileMaps
from offload.report.live import Snapshot
from offload.report.record import Record
from offload.report.report import Report
from offload.report.write import write_record
from offload.runtime.early_reads import EarlyReads
from offload.runtime.interrupts import HeldInterrupts
from offload.runtime.machine import Machine
from offload.scheduler.plan import Plan
from offload.scheduler.renamed import Renamed
from offload.scheduler.trace import Trace
from offload.session.cache_methods import CacheMethods
from offload.session.expert_methods import ExpertMethods
from offload.session.request import Request
from offload.session.session_machine import session_budgets, session_machine
from offload.session.training_methods import TrainingMethods
from offload.storage.errors import ProfileError, SessionError, counted
from offload.storage.host_buffer import release_freed_memory
from offload.storage.process_memory import process_bytes

if TYPE_CHECKING:
    from offload.session.opened import Opened


_OPENING = "offload.session.opening"


class Session(TrainingMethods, CacheMethods, ExpertMethods, Renamed):
    """An offloaded model, from `with` to the end of its block. Made by `offload`.

    Example:
        ::

            with offload("org/model", gpu_memory="8GiB") as session:
                output = session.model.generate(**inputs, max_new_tokens=100)
                print(session.report())
    """

    RENAMED: ClassVar[Mapping[str, str]] = {
        "keeps_beginnings": "caches_prefixes",
        "shares_beginnings": "shares_prefixes",
        "outlook": "training_estimate",
    }

    def __init__(self, request: Request) -> None:
        self._request = request
        self._hardware = request.hardware or kept_profile(request.device, request.disk_dir)
        if request.hardware is not None and not suits(request.hardware, request.device):
            has = "no GPU" if request.hardware.device is None else "a GPU"
            raise ProfileError(f"the hardware profile describes a machine with {has}, and {request.device.name} computes here")
        self._stack: ExitStack | None = None
        self._opened: Opened | None = None
        self._inside = False
        self._process = os.getpid()

    def __enter__(self) -> "Session":
        if self._stack is not None:
            raise SessionError("this session was entered already; call offload(...) again for another one")
        self._stack = ExitStack()
        release_freed_memory()
        before_bytes = process_bytes()
        try:
            # Parameters, homes and slots outlive an inference mode that the user is in, and are written to after it.
            with HeldInterrupts() as interrupts, held_collector(), torch.inference_mode(False):
                progress = partial(_progress_between_interrupts, interrupts, self._request.progress)
                self._opened = self._open(self._stack, progress, before_bytes)
        except BaseException:
            with HeldInterrupts():
                self._stack.close()
            raise
        self._inside = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._stack is not None
        if os.getpid() != self._process:
            # Forked: threads and locks are the parent's.
            return
        # A pass that another thread is in the middle of is waited for.
        with HeldInterrupts(), self._parts.machine.lock:
            self._inside = False
            self._stack.close()

    def __repr__(self) -> str:
        if self._opened is None:
            return "<Session, not entered yet>"
        weights, name = self.plan.weights, type(self._opened.model).__name__
        return (
            f"<Session of {name} on {self.machine.device.name}: {counted(len(weights.resident), 'block')} resident, "
            f"{len(weights.streamed)} streamed{'' if self._inside else ', left'}>"
        )

    def _repr_html_(self) -> str:
        """Show the report in a notebook."""
        return f"<p>{escape(repr(self))}</p>" if self._opened is None else self.report()._repr_html_()

    @property
    def model(self) -> nn.Module:
        """The model: plain transformers code works on it, `generate` and `state_dict` included."""
        model = self._parts.model
        return model if self._request.compiled is None else self._request.compiled

    @property
    def plan(self) -> Plan:
        """What lives where, as it is now."""
        return self._parts.residency.plan

    @property
    def machine(self) -> Machine:
        """What the session runs on."""
        return self._parts.machine

    def report(self) -> Report:
        """Report what was moved and how fast, so far, beside what was predicted for it. Measures the disk for a moment."""
        return self._parts.reporter.report(may_measure=self._inside)

    def snapshot(self) -> Snapshot:
        """Say where it stands: cheap, and from any thread while the model runs. What it takes to measure is in `report`."""
        return self._parts.reporter.snapshot()

    def trace(self) -> Trace:
        """Return when each resource was busy, so far: spans and memory over time. Sums are in `report`."""
        machine = self._parts.machine
        machine.copies.collect()
        return machine.host.recorder.trace

    def write_report(self, path: str | Path) -> None:
        """Write the report with its trace: as a page if the name ends in .html, else as JSON, which `offload report` reads."""
        write_record(Record.of(self.report(), self.trace()), str(path))

    @property
    def _parts(self) -> "Opened":
        if self._opened is None:
            raise SessionError(
                "there is no model and nothing to report yet: enter the session first, `with offload(...) as session:`"
            )
        return self._opened

    def _open(self, stack: ExitStack, progress: Progress, before_bytes: int) -> "Opened":
        """Begin to read what can be read already, and import what knows models meanwhile: that takes seconds."""
        request = self._request
        held_bytes = _anonymous_bytes(request.target) if isinstance(request.target, nn.Module) else 0
        budgets = session_budgets(request, held_bytes)
        machine, early = None, None
        if request.device.shares_host_memory:
            machine = session_machine(request, budgets, progress, stack)
            if request.can_read_early:
                early = EarlyReads(request.kept_weights_key)
                stack.callback(early.drop)
                early.begin(machine, budgets.device_bytes)
        if _OPENING not in sys.modules:
            before_bytes += _imported_bytes(early)
        from offload.session.opening import Opening

        opening = Opening(request, self._hardware, stack, progress, budgets, before_bytes, held_bytes, machine, early)
        return opening.open()


def _imported_bytes(early: EarlyReads | None) -> int:
    """Import what knows models; returns the memory that its code takes, which the session is not to be charged with."""

    def held() -> int:
        return process_bytes() - (0 if early is None else early.resident_bytes)

    before = held()
    importlib.import_module(_OPENING)
    return max(0, held() - before)


def _progress_between_interrupts(interrupts: HeldInterrupts, progress: Progress, what: str, done: int, total: int) -> None:
    interrupts.let_through()
    progress(what, done, total)


def _anonymous_bytes(model: nn.Module) -> int:
    maps = FileMaps()
    return sum(value.nbytes for value in model.parameters() if maps.locate(value.data) is None)
