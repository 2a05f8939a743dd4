"""What happened: the facts of a session, and their stable JSON."""

import json
import resource
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any, ClassVar

from offload.report.comparison import Comparison
from offload.report.experts import ExpertUse
from offload.report.facts import LinkUse, Peak, PhaseUse, TierUse, short_name
from offload.report.schema import RENAMED, SCHEMA, upgraded
from offload.report.training import TrainingReport
from offload.scheduler.phases import BACKWARD, DECODE, PREFILL, STANDALONE
from offload.scheduler.prediction import WhatIf
from offload.scheduler.renamed import Renamed


@dataclass(frozen=True, slots=True, repr=False)
class Report(Renamed):
    """A session so far. `print` it, or take `to_dict` and `to_json`: their keys are stable (docs/report.md).

    Attributes:
        exactness: `identical`, `rounding` or `lossy`: what the outputs are compared with the plain model's.
        process_bytes: anonymous memory of the process before the session: Python, torch, what was loaded already.
        peak_rss_bytes: the most that the whole process held in RAM at once, mapped files included.
        loading_seconds: the first pass stood still so long for weights that stay on the device from then on; in no phase.
        major_faults: pages that the process had to read back from disk during the session, since memory was short of them.
        parts: into what layers and passes were taken apart: `cpu_percent` of a divided layer's rows that the CPU computes,
            `micro_batch` and `decode_micro_batch` sequences that a layer computes at once, `prefill_chunk` tokens of a prompt
            in a pass; 0 where not.
        peak: of the memory of the device that computes: predicted, and measured.
        tracing: `spans` noted, the `seconds` that took, and how many were `dropped` because the record was full.
        training: what was learned; None where nothing was trained by a loop of offload's.
        experts: what became of experts that were brought one by one; None where none were.
        fallbacks: a sentence for everything that was slower than it could be, and why.
        versions: of what computed, by name.
        command: what was typed, where a command made it.
    """

    RENAMED: ClassVar[Mapping[str, str]] = RENAMED[""]

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
    standalone: PhaseUse
    prediction: Comparison | None
    peak: Peak
    tracing: dict[str, float]
    process_bytes: int
    peak_device_bytes: int | None
    fallbacks: list[str]
    training: TrainingReport | None = None
    experts: ExpertUse | None = None
    schema: int = SCHEMA
    major_faults: int = 0
    loading_seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    peak_rss_bytes: int = field(default_factory=lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Report":
        """Read what `to_dict` gave, of this schema or an older one.

        Raises:
            TypeError, KeyError, ValueError: for anything else.
        """
        values = upgraded(content)
        values["tiers"] = {name: TierUse(**use) for name, use in values["tiers"].items()}
        values["links"] = {name: LinkUse(**use) for name, use in values["links"].items()}
        for phase in (PREFILL, DECODE, BACKWARD, STANDALONE):
            values[phase] = PhaseUse(**values[phase])
        values["peak"] = Peak(**values["peak"])
        if values.get("training") is not None:
            values["training"] = TrainingReport.from_dict(values["training"])
        if values.get("experts") is not None:
            values["experts"] = ExpertUse.from_dict(values["experts"])
        if values["prediction"] is not None:
            what_if = [WhatIf(**item) for item in values["prediction"]["what_if"]]
            values["prediction"] = Comparison(**(values["prediction"] | {"what_if": what_if}))
        return cls(**values)

    def summary(self) -> str:
        """How fast, how much memory, and what held it back: three lines, and one for each fallback."""
        from offload.report.summary import summary

        return summary(self)

    def __str__(self) -> str:
        from offload.report.text import as_text

        return as_text(self)

    def __repr__(self) -> str:
        return f"<Report of {short_name(self.model)} on {self.device}: print it>"

    def _repr_html_(self) -> str:
        """Show the summary in a notebook, and the whole report where it is asked for."""
        return (
            f"<pre>{escape(self.summary())}</pre><details><summary>all of it</summary><pre>{escape(str(self))}</pre></details>"
        )
