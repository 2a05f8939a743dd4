"""The report as a table for a terminal."""

from io import StringIO
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from offload.report.comparison import Comparison
from offload.report.facts import LEAST_JUDGED_BYTES, Peak, PhaseUse, TierUse, bytes_error, seconds_error, short_name
from offload.report.kv import kv_sentences
from offload.report.summary import time_by_cause
from offload.storage.errors import duration, gib

if TYPE_CHECKING:
    from offload.report.report import Report

_WIDTH = 100

_LONG_SECONDS = 1.0
"""Loading is told where it took longer."""

_MANY_FAULTS = 500
"""Fewer are no sign of anything: code that is used for the first time."""


def as_text(report: "Report") -> str:
    """Plain text, without colours."""
    out = StringIO()
    Console(file=out, width=_WIDTH, color_system=None, legacy_windows=False).print(as_renderable(report))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def as_renderable(report: "Report") -> RenderableType:
    parts: list[RenderableType] = [_headline(report), _tiers(report)]
    if any(use.bytes for use in report.links.values()):
        parts.append(_links(report))
    phases = {
        "forward" if report.backward.passes else "prefill": report.prefill,
        "decode": report.decode,
        "backward": report.backward,
        "outside the model's forward": report.standalone,
    }
    ran = {name: use for name, use in phases.items() if use.seconds}
    if ran:
        parts.append(_phases(ran))
    parts += [Text(sentence) for sentence in kv_sentences(report.kv)]
    if report.experts is not None:
        parts += [Text(sentence) for sentence in report.experts.sentences()]
    if report.training is not None:
        parts.append(Text(str(report.training)))
    if report.prediction is not None:
        parts.append(_prediction(report.prediction))
    if report.peak.measured_bytes:
        parts.append(
            Text(f"peak of memory: {_peak(report.peak)}; noting {report.tracing['spans']:,} spans took {_share(report)}")
        )
    parts += [Text(f"fell back: {sentence}") for sentence in report.fallbacks]
    return Group(*parts)


def _headline(report: "Report") -> Text:
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in report.blocks.items() if count)
    slots = f"; {report.slots['count']} slots of {gib(report.slots['bytes'])}" if report.slots["count"] else ""
    loading = (
        f"; the first pass waited {duration(report.loading_seconds)} for them"
        if report.loading_seconds >= _LONG_SECONDS
        else ""
    )
    faults = f"; {report.major_faults:,} pages read back from disk" if report.major_faults >= _MANY_FAULTS else ""
    return Text(
        f"{short_name(report.model)} on {report.device}: {gib(report.weight_bytes)} of weights{loading}, "
        f"exactness {report.exactness}\n"
        f"blocks: {counts}{slots}; {gib(report.streamed_bytes_per_pass)} streamed a pass\n"
        f"process: {gib(report.process_bytes)} before the session, "
        f"{gib(report.peak_rss_bytes)} at its peak, mapped files included{faults}"
    )


def _tiers(report: "Report") -> Table:
    table = _table("memory", "budget", "peak", "now", "unaccounted", "at the peak")
    for name, tier in report.tiers.items():
        if tier.budget_bytes or tier.peak_bytes:
            budget = "no limit" if tier.budget_bytes is None else gib(tier.budget_bytes)
            unaccounted = "" if tier.unaccounted_bytes is None else gib(tier.unaccounted_bytes)
            table.add_row(name, budget, gib(tier.peak_bytes), gib(tier.used_bytes), unaccounted, _categories(tier))
    return table


def _categories(tier: TierUse) -> str:
    return ", ".join(f"{name} {gib(count)}" for name, count in sorted(tier.at_peak_bytes.items(), key=lambda item: -item[1]))


def _links(report: "Report") -> Table:
    table = _table("link", "moved", "busy", "speed", "measured speed of the link")
    for name, link in report.links.items():
        measured, speed = link.measured_bytes_per_second, link.bytes_per_second
        judged = measured and speed and link.bytes >= LEAST_JUDGED_BYTES
        share = f" ({(speed or 0.0) / (measured or 1.0):.0%} of it reached)" if judged else ""
        table.add_row(name, gib(link.bytes), f"{link.seconds:.2f} s", _rate(speed), _rate(measured) + share)
    return table


def _phases(phases: dict[str, PhaseUse]) -> Table:
    table = _table("phase", "tokens", "time", "speed", "where the time went")
    for name, use in phases.items():
        speed = f"{use.tokens_per_second:.2f} tokens/s" if use.tokens else ""
        first = f", {duration(use.first_seconds)} of it the first" if use.passes > 1 and use.first_seconds else ""
        table.add_row(name, str(use.tokens or ""), f"{use.seconds:.2f} s{first}", speed, _shares(use))
    return table


def _prediction(comparison: Comparison) -> Text:
    first = _beside(comparison.prefill_seconds, comparison.prefill_measured_seconds, comparison.prefill_error)
    step = _beside(comparison.seconds_per_token, comparison.measured_seconds_per_token, comparison.seconds_per_token_error)
    guess = "" if comparison.exact_work else " (the model's work was estimated from its sizes)"
    drifts = [f"{name} {share:+.0%}" for name, share in comparison.drift.items()]
    own = seconds_error(comparison.model_error, comparison.measured_seconds_per_token)
    rest = f"; with what they gave now the prediction is {own} off" if own else ""
    drifted = f"\nspeed of links beside the profile's: {', '.join(drifts)}{rest}" if drifts else ""
    return Text(f"predicted: the first prefill {first}; a token {step}; bound by {comparison.bound}{guess}{drifted}")


def _peak(peak: Peak) -> str:
    measured = peak.measured_bytes or 1
    error = bytes_error(peak.predicted_bytes, measured)
    return f"{gib(peak.predicted_bytes)} predicted, {gib(measured)} measured" + (f" ({error})" if error else "")


def _share(report: "Report") -> str:
    whole = report.prefill.seconds + report.decode.seconds + report.standalone.seconds
    return f"{report.tracing['seconds'] / whole:.2%} of the time" if whole else "no time"


def _beside(predicted: float, measured: float | None, error: float | None) -> str:
    if measured is None or error is None:
        return f"{duration(predicted)}"
    shown = seconds_error(error, predicted, measured)
    return f"{duration(predicted)}, measured {duration(measured)}" + (f" ({shown})" if shown else "")


def _shares(use: PhaseUse) -> str:
    shares = {name: seconds / use.seconds for name, seconds in time_by_cause(use).items()}
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005)


def _rate(bytes_per_second: float | None) -> str:
    return f"{bytes_per_second / 1e9:.2f} GB/s" if bytes_per_second else ""


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
