"""What happened when, on which resource: one schema for the runtime and for the simulator."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

TRACE_FORMAT = 1

PASS = "pass"
COMPUTE = "compute"
HOST_COMPUTE = "cpu"
OWN = "offload"
WAIT = "wait"
"""The resources beside the links, which go by their own names: `disk`, `h2d`, `d2h`."""


class Span(NamedTuple):
    """A resource was busy.

    Attributes:
        resource: `compute`, a link's name, `pass` for a call of the model, `wait` while compute stood still,
            `offload` for the runtime's own work between the blocks.
        name: the block; the phase of a pass; the link that was waited for.
        nbytes: moved, where something was.
    """

    resource: str
    name: str
    begin_seconds: float
    end_seconds: float
    nbytes: int = 0

    @property
    def seconds(self) -> float:
        return self.end_seconds - self.begin_seconds


class MemorySample(NamedTuple):
    """From this moment on a tier held so much of a category."""

    seconds: float
    tier: str
    category: str
    nbytes: int


@dataclass(slots=True)
class Trace:
    """Spans in the order in which they ended, from a common zero.

    Attributes:
        source: `runtime` or `simulator`.
        dropped_spans: that came after the record was full.
    """

    source: str
    spans: list[Span] = field(default_factory=list)
    memory: list[MemorySample] = field(default_factory=list)
    dropped_spans: int = 0

    def on(self, resource: str) -> list[Span]:
        return [span for span in self.spans if span.resource == resource]

    def resources(self) -> list[str]:
        return list(dict.fromkeys(span.resource for span in self.spans))

    @property
    def end_seconds(self) -> float:
        return max((span.end_seconds for span in self.spans), default=0.0)

    def passes(self, phase: str) -> list[Span]:
        return [span for span in self.on(PASS) if span.name == phase]

    def attribution(self, phase: str | None = None) -> dict[str, float]:
        """Seconds of the passes of `phase` (None for all), by cause.

        Compute and waits never overlap, as waits are what the computing thread or stream stood still for. What is left
        of a pass is the model's code between the blocks.
        """
        passes = [span for span in self.on(PASS) if phase is None or span.name == phase]
        causes: dict[str, float] = {}
        for span in _within(self.spans, passes):
            if span.resource in (COMPUTE, HOST_COMPUTE, OWN):
                causes[span.resource] = causes.get(span.resource, 0.0) + span.seconds
            elif span.resource == WAIT:
                cause = f"wait for {span.name}"
                causes[cause] = causes.get(cause, 0.0) + span.seconds
        total = sum(span.seconds for span in passes)
        causes["between blocks"] = max(0.0, total - sum(causes.values()))
        return causes

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": TRACE_FORMAT,
            "source": self.source,
            "dropped_spans": self.dropped_spans,
            "spans": [list(span) for span in self.spans],
            "memory": [list(sample) for sample in self.memory],
        }

    @classmethod
    def from_dict(cls, content: Any) -> "Trace":
        """Raises ValueError for what `to_dict` did not write."""
        if not isinstance(content, dict) or content.get("format") != TRACE_FORMAT:
            raise ValueError(f'not a trace: no "format": {TRACE_FORMAT}')
        return cls(
            content["source"],
            [Span(*span) for span in content["spans"]],
            [MemorySample(*sample) for sample in content["memory"]],
            content["dropped_spans"],
        )


def _within(spans: Iterable[Span], passes: Sequence[Span]) -> Iterable[Span]:
    """The spans that begin in one of the passes; both in the order of time."""
    index = 0
    for span in sorted(spans, key=lambda span: span.begin_seconds):
        while index < len(passes) and passes[index].end_seconds <= span.begin_seconds:
            index += 1
        if index < len(passes) and passes[index].begin_seconds <= span.begin_seconds:
            yield span
