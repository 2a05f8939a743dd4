"""What happened: the facts of a session, and their stable JSON."""

import json
import resource
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from offload.planning.compare import Comparison
from offload.planning.predictor import WhatIf
from offload.report.experts import ExpertUse
from offload.report.training import Learning
from offload.runtime.clock import BACKWARD, DECODE, OUTSIDE, PREFILL, PhaseTimes
from offload.storage.ledger import MemoryLedger


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
class PhaseUse:
    """Where the time of one phase went."""

    passes: int
    tokens: int
    seconds: float
    seconds_per_token: float | None
    tokens_per_second: float | None
    first_seconds: float
    compute_seconds: float
    own_seconds: float
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
            own_seconds=times.own_seconds,
            wait_seconds=dict(times.wait_seconds),
            other_seconds=times.other_seconds,
        )


@dataclass(frozen=True, slots=True)
class Report:
    """A session so far. `print` it, or take `to_dict` and `to_json`: their keys are stable (docs/report.md).

    Attributes:
        exactness: `identical`, `rounding` or `lossy`: what the outputs are compared with the plain model's.
        process_bytes: anonymous memory of the process before the session: Python, torch, what was loaded already.
        peak_rss_bytes: the most that the whole process held in RAM at once, mapped files included.
        parts: into what layers and passes were taken apart: `host_percent` of a divided layer's rows that the CPU computes,
            `micro_batch` and `decode_micro_batch` sequences that a layer computes at once, `prefill_chunk` tokens of a prompt
            in a pass; 0 where not.
        peak: of the memory of the device that computes: predicted, and measured.
        tracing: `spans` noted, the `seconds` that took, and how many were `dropped` because the record was full.
        training: what was learned; None where nothing was trained by a loop of offload's.
        experts: what became of experts that were brought one by one; None where none were.
        fallbacks: a sentence for everything that was slower than it could be, and why.
    """

    model: str
    device: str
    engine: str
    exactness: str
    parameters: int
    weight_bytes: int
    blocks: dict[str, int]
    parts: dict[str, int]
    slots: dict[str, int]
    streamed_bytes_per_pass: int
    kv: dict[str, int | str]
    tiers: dict[str, TierUse]
    links: dict[str, LinkUse]
    prefill: PhaseUse
    decode: PhaseUse
    backward: PhaseUse
    outside: PhaseUse
    prediction: Comparison | None
    peak: Peak
    tracing: dict[str, float]
    process_bytes: int
    peak_device_bytes: int | None
    fallbacks: list[str]
    training: Learning | None = None
    experts: ExpertUse | None = None
    peak_rss_bytes: int = field(default_factory=lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Report":
        """The other way round. Raises TypeError or KeyError for what `to_dict` did not give."""
        values = dict(content)
        values["tiers"] = {name: TierUse(**use) for name, use in values["tiers"].items()}
        values["links"] = {name: LinkUse(**use) for name, use in values["links"].items()}
        for phase in (PREFILL, DECODE, BACKWARD, OUTSIDE):
            values[phase] = PhaseUse(**values[phase])
        values["peak"] = Peak(**values["peak"])
        if values.get("training") is not None:
            values["training"] = Learning.from_dict(values["training"])
        if values.get("experts") is not None:
            values["experts"] = ExpertUse.from_dict(values["experts"])
        if values["prediction"] is not None:
            what_if = [WhatIf(**item) for item in values["prediction"]["what_if"]]
            values["prediction"] = Comparison(**(values["prediction"] | {"what_if": what_if}))
        return cls(**values)

    def __str__(self) -> str:
        from offload.report.text import as_text

        return as_text(self)


def phase_uses(phases: Mapping[str, PhaseTimes]) -> dict[str, PhaseUse]:
    """The phases by the names of the report's fields, those that never ran included."""
    return {name: PhaseUse.of(phases.get(name, PhaseTimes())) for name in (PREFILL, DECODE, BACKWARD, OUTSIDE)}
