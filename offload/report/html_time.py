"""Where the time went, on the page: shares of each phase, and the first passes as a timeline."""

from collections.abc import Iterable, Sequence
from typing import Any

from offload.report.html_parts import bar, text
from offload.scheduler.trace import COMPUTE, HOST_COMPUTE, OWN, PASS, WAIT, Span, Trace
from offload.storage.errors import counted, duration

_WIDTH, _ROW = 1000, 26
_SPANS_DRAWN = 3000
_DECODE_PASSES_DRAWN = 6
_RESOURCE_COLOURS = {
    PASS: "--grey",
    COMPUTE: "--green",
    HOST_COMPUTE: "--teal",
    WAIT: "--red",
    OWN: "--violet",
    "disk": "--orange",
    "h2d": "--blue",
}


def times(report: dict[str, Any]) -> str:
    rows = []
    for name in ("prefill", "decode", "backward"):
        use = report[name]
        if not use["seconds"]:
            continue
        parts = [("compute", use["compute_seconds"], "--green")]
        parts += [
            (f"waiting for {link}", wait, _RESOURCE_COLOURS.get(link, "--red")) for link, wait in use["wait_seconds"].items()
        ]
        parts.append(("offload's own work", use["overhead_seconds"], "--violet"))
        parts.append(("between blocks", use["other_seconds"], "--grey"))
        rows.append(
            f"<p><b>{text(phase(name, report))}</b> <span class=faint>{duration(use['seconds'])}, {counted(use['passes'], 'pass', 'passes')}</span></p>"
        )
        rows.append(bar(parts, use["seconds"]))
    return f"<section><h2>Where the time went</h2>{''.join(rows)}</section>" if rows else ""


def phase(name: str, report: dict[str, Any]) -> str:
    """Passes without a cache are prompts, or the forward passes of training."""
    return "forward" if name == "prefill" and report["backward"]["passes"] else name


def timeline(trace: Trace, tracing: dict[str, Any]) -> str:
    """The first prefill and some decode passes: one row a resource."""
    passes = trace.on(PASS)
    if not passes:
        return ""
    first, last = passes[0], passes[min(len(passes) - 1, _DECODE_PASSES_DRAWN)]
    begin, end = first.begin_seconds, last.end_seconds
    rows = []
    for resource in _ordered(trace.resources()):
        spans = [span for span in trace.on(resource) if span.end_seconds > begin and span.begin_seconds < end]
        if spans:
            name = "stalled" if resource == WAIT else resource
            rows.append(f"<div class=track><span>{text(name)}</span>{_spans(resource, spans[:_SPANS_DRAWN], begin, end)}</div>")
    axis = f"<div class=axis><span>0</span><span>{duration((end - begin) / 2)}</span><span>{duration(end - begin)}</span></div>"
    count = passes.index(last) + 1
    return (
        f"<section><h2>The first {count} passes</h2>{''.join(rows)}{axis}"
        f"<p class=faint>Point at a span for its block. The whole trace: --trace FILE.json, for ui.perfetto.dev. {_tracing_note(tracing)}</p>"
        "</section>"
    )


def _tracing_note(tracing: dict[str, Any]) -> str:
    dropped = f" {tracing['dropped']:,} spans after those were not kept." if tracing["dropped"] else ""
    return f"Noting {tracing['spans']:,} spans took {duration(tracing['seconds'])}.{dropped}"


def _ordered(resources: Iterable[str]) -> list[str]:
    wanted = [PASS, COMPUTE, HOST_COMPUTE, WAIT, OWN]
    links = sorted(set(resources) - set(wanted))
    return [name for name in wanted if name in resources] + links


def _spans(resource: str, spans: Sequence[Span], begin: float, end: float) -> str:
    scale = _WIDTH / (end - begin)
    rects = []
    for index, span in enumerate(spans):
        left, right = max(span.begin_seconds, begin), min(span.end_seconds, end)
        colour = _RESOURCE_COLOURS.get(span.name if resource == WAIT else resource, "--violet")
        speed = f", {span.nbytes / span.seconds / 1e9:.2f} GB/s" if span.nbytes and span.seconds else ""
        title = f"{span.name or resource}: {duration(span.seconds)}{speed}"
        rects.append(
            f"<rect x='{(left - begin) * scale:.2f}' y=3 width='{max(0.4, (right - left) * scale):.2f}' height=20 "
            f"fill='var({colour})' fill-opacity='{0.95 if index % 2 else 0.7}'><title>{text(title)}</title></rect>"
        )
    return f"<svg viewBox='0 0 {_WIDTH} {_ROW}' preserveAspectRatio=none role=img>{''.join(rects)}</svg>"
