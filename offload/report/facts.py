"""What was measured of tiers, links and phases: the parts of a report."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import ClassVar

from offload.report.schema import RENAMED
from offload.scheduler.phases import BACKWARD, DECODE, PREFILL, STANDALONE, PhaseTimes
from offload.scheduler.renamed import Renamed
from offload.storage.ledger import MemoryLedger


def short_name(model: str) -> str:
    """A folder without the folders that it is in; a hub id as it is."""
    return PurePath(model).name if PurePath(model).is_absolute() else model


LEAST_JUDGED_SECONDS, LEAST_JUDGED_BYTES = 0.1, 64 << 20
"""An error in percent of less says nothing: what a process does beside is as much."""


def seconds_error(error: float | None, *seconds: float | None) -> str:
    """An error of predicted seconds, `+5%`; empty where one of the times is too short to say anything."""
    return "" if error is None or min(each or 0.0 for each in seconds) < LEAST_JUDGED_SECONDS else f"{error:+.0%}"


def bytes_error(predicted: int, measured: int) -> str:
    """An error of predicted bytes, `+5%`; empty where so few say nothing."""
    return "" if min(predicted, measured) < LEAST_JUDGED_BYTES else f"{predicted / measured - 1:+.0%}"


@dataclass(frozen=True, slots=True)
class TierUse:
    """Bytes on one tier.

    Attributes:
        budget_bytes: None where there is no limit.
        at_peak_bytes: by category, at the moment of the peak.
        unaccounted_bytes: what the process or the card holds beyond what it held before the session and what the runtime
            knows of: a KV cache and outputs that are kept, workspaces, fragments. None where nothing tells.
    """

    budget_bytes: int | None
    peak_bytes: int
    used_bytes: int
    at_peak_bytes: dict[str, int]
    unaccounted_bytes: int | None = None

    @classmethod
    def of(cls, ledger: MemoryLedger, unaccounted_bytes: int | None = None) -> "TierUse":
        used, peak = ledger.used_bytes, ledger.peak_bytes
        return cls(ledger.budget_bytes, peak, used, ledger.by_category_at_peak(), unaccounted_bytes)


@dataclass(frozen=True, slots=True)
class Peak:
    """The most that a tier holds.

    Attributes:
        predicted_bytes: what the plan takes, and on the CPU a margin for what the allocator and the kernels hold.
        measured_bytes: of the process beyond what it held before the session, looked at after each pass; on a card what
            torch held. None where nothing tells.
    """

    predicted_bytes: int
    measured_bytes: int | None


@dataclass(frozen=True, slots=True)
class LinkUse:
    """What crossed one link.

    Attributes:
        bytes: of weights that arrived.
        seconds: during which the link was busy.
        bytes_per_second: the one over the other; None if nothing crossed.
        measured_bytes_per_second: the link's own speed, measured at the time of the report; None where it was not.
    """

    bytes: int
    seconds: float
    bytes_per_second: float | None
    measured_bytes_per_second: float | None = None

    @classmethod
    def of(cls, nbytes: int, seconds: float) -> "LinkUse":
        return cls(nbytes, seconds, nbytes / seconds if nbytes and seconds else None)


@dataclass(frozen=True, slots=True)
class PhaseUse(Renamed):
    """Where the time of one phase went."""

    RENAMED: ClassVar[Mapping[str, str]] = RENAMED["decode"]

    passes: int
    tokens: int
    seconds: float
    seconds_per_token: float | None
    tokens_per_second: float | None
    first_seconds: float
    compute_seconds: float
    overhead_seconds: float
    wait_seconds: dict[str, float]
    other_seconds: float

    @classmethod
    def of(cls, times: PhaseTimes) -> "PhaseUse":
        return cls(
            passes=times.passes,
            tokens=times.tokens,
            seconds=times.seconds,
            seconds_per_token=times.seconds / times.tokens if times.tokens else None,
            tokens_per_second=times.tokens / times.seconds if times.seconds else None,
            first_seconds=times.first_seconds,
            compute_seconds=times.compute_seconds,
            overhead_seconds=times.overhead_seconds,
            wait_seconds=dict(times.wait_seconds),
            other_seconds=times.other_seconds,
        )


def phase_uses(phases: Mapping[str, PhaseTimes]) -> dict[str, PhaseUse]:
    """The phases by the names of the report's fields, those that never ran included."""
    return {name: PhaseUse.of(phases.get(name, PhaseTimes())) for name in (PREFILL, DECODE, BACKWARD, STANDALONE)}
