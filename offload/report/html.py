"""A run as one page: no script, no request to anywhere, light and dark, phone and desktop."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

from offload.report.experts import ExpertUse
from offload.report.facts import bytes_error, seconds_error
from offload.report.kv import kv_sentences
from offload.report.record import Record
from offload.report.training import TrainingReport
from offload.scheduler.trace import COMPUTE, HOST_COMPUTE, OWN, PASS, WAIT, Span, Trace
from offload.storage.errors import duration, gib

_WIDTH, _ROW = 1000, 26
_SPANS_DRAWN = 3000
_DECODE_PASSES_DRAWN = 6
_COLOURS = ("--blue", "--orange", "--green", "--violet", "--pink", "--teal", "--brown", "--grey")
_RESOURCE_COLOURS = {
    PASS: "--grey",
    COMPUTE: "--green",
    HOST_COMPUTE: "--teal",
    WAIT: "--red",
    OWN: "--violet",
    "disk": "--orange",
    "h2d": "--blue",
}

_STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --ink: #1d1d1f; --faint: #6a6a70; --line: #e2e2de; --panel: #ffffff;
  --blue: #3b76c4; --orange: #d9812e; --green: #4b9a57; --violet: #8263b3; --pink: #c9648e; --teal: #2f9494; --brown: #94694b;
  --grey: #a7a7ad; --red: #c8473c; }
@media (prefers-color-scheme: dark) { :root { --paper: #161618; --ink: #ececee; --faint: #9d9da6; --line: #34343a;
  --panel: #1f1f23; --blue: #6ba3ea; --orange: #efa25a; --green: #72c27f; --violet: #ab8fdb; --pink: #e58fb3; --teal: #5cc0c0;
  --brown: #c29878; --grey: #74747c; --red: #ec7469; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 24px 16px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0 0 2px; overflow-wrap: anywhere; } h2 { font-size: 16px; margin: 0 0 10px; }
p { margin: 4px 0; } .faint { color: var(--faint); }
section { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 16px; margin-top: 16px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 16px; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.card b { display: block; font-size: 22px; font-weight: 600; } .card span { color: var(--faint); font-size: 13px; }
svg { display: block; width: 100%; height: auto; } svg.tall { height: 150px; }
.bar { display: flex; height: 26px; border-radius: 5px; overflow: hidden; background: var(--line); margin: 4px 0; }
.bar i { display: block; } .keys { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; margin: 6px 0 12px; }
.keys i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td:first-child { white-space: normal; min-width: 90px; }
@media (max-width: 520px) { th, td { padding-right: 8px; font-size: 13px; } }
th { font-weight: 600; color: var(--faint); font-size: 13px; } td.n, th.n { text-align: right; }
.track { display: grid; grid-template-columns: 68px 1fr; align-items: center; gap: 8px; font-size: 13px; }
.track svg { height: 26px; } .axis { display: flex; justify-content: space-between; color: var(--faint); font-size: 12px;
  margin-left: 76px; } .memory .axis { margin-left: 0; }
"""


def as_html(record: Record) -> str:
    """The whole page."""
    report = record.report
    title = f"{report['model']} on {report['device']}"
    body = "".join(
        (
            f"<h1>{_text(title)}</h1>",
            f"<p class=faint>{gib(report['weight_bytes'])} of weights; {_text(_blocks(report))}; "
            f"exactness {_text(report['exactness'])}</p>",
            _cards(report),
            _times(report),
            _learning(report.get("training")),
            _kv(report["kv"]),
            _experts(report.get("experts")),
            _timeline(record.trace, report["tracing"]),
            _links(report),
            _memory(record),
            _prediction(report.get("prediction"), report["peak"]),
            _fallbacks(report["fallbacks"]),
        )
    )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>{body}</body></html>"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _blocks(report: dict[str, Any]) -> str:
    return ", ".join(f"{count} blocks {name.replace('_', ' ')}" for name, count in report["blocks"].items() if count)


def _cards(report: dict[str, Any]) -> str:
    prefill, decode = report["prefill"], report["decode"]
    facts = []
    if report.get("training"):
        training = report["training"]
        facts.append((duration(training["step_seconds"]), "a step (median)"))
        facts += [(f"{loss:.4f}", f"loss of step {step}") for step, loss in training["losses"][-1:]]
    elif prefill["passes"]:
        facts.append((duration(prefill["first_seconds"]), "the first prompt (prefill)"))
    if decode["passes"]:
        facts.append((duration(decode["seconds"] / decode["passes"]), "a token"))
        facts.append((f"{decode['tokens_per_second']:.2f}", "tokens a second, each sequence"))
    facts += [
        (gib(tier["peak_bytes"]), f"peak of {name} memory") for name, tier in report["tiers"].items() if tier["peak_bytes"]
    ]
    facts.append((gib(report["streamed_bytes_per_pass"]), "streamed a pass"))
    return f"<div class=cards>{''.join(f'<div class=card><b>{_text(value)}</b><span>{_text(name)}</span></div>' for value, name in facts)}</div>"


def _kv(content: dict[str, Any]) -> str:
    said = "".join(f"<p>{_text(sentence)}</p>" for sentence in kv_sentences(content))
    return f"<section><h2>KV cache</h2>{said}</section>" if said else ""


def _experts(content: dict[str, Any] | None) -> str:
    if content is None:
        return ""
    use = ExpertUse.from_dict(content)
    rows = [
        f"<tr><td>{_text(layer.layer)}</td><td class=n>{layer.choices:,}</td>"
        f"<td class=n>{layer.hits / max(1, layer.choices):.1%}</td><td class=n>{layer.copies:,}</td>"
        f"<td class=n>{gib(layer.copied_bytes)}</td><td class=n>{layer.computed_on_cpu:,}</td></tr>"
        for layer in use.layers
    ]
    said = "".join(f"<p>{_text(sentence)}</p>" for sentence in use.sentences())
    names = "".join(f"<th class=n>{name}</th>" for name in ("asked for", "were there", "brought", "bytes", "on the CPU"))
    table = f"<table><tr><th>layer</th>{names}</tr>{''.join(rows)}</table>"
    return f"<section><h2>Experts</h2>{said}<details><summary>by layer</summary><div class=scroll>{table}</div></details></section>"


def _times(report: dict[str, Any]) -> str:
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
            f"<p><b>{_text(_phase(name, report))}</b> <span class=faint>{duration(use['seconds'])}, {_count(use['passes'], 'pass', 'passes')}</span></p>"
        )
        rows.append(_bar(parts, use["seconds"]))
    return f"<section><h2>Where the time went</h2>{''.join(rows)}</section>" if rows else ""


def _phase(name: str, report: dict[str, Any]) -> str:
    """Passes without a cache are prompts, or the forward passes of training."""
    return "forward" if name == "prefill" and report["backward"]["passes"] else name


def _learning(training: dict[str, Any] | None) -> str:
    """The loss of each step, and of the evaluation data."""
    if not training or len(training["losses"]) < 2:
        return ""
    losses, eval_losses = training["losses"], training["eval_losses"]
    first, last = losses[0][0], losses[-1][0]
    values = [loss for _, loss in (*losses, *eval_losses)]
    low, high = min(values), max(values)

    def place(step: float, loss: float) -> tuple[float, float]:
        return 1000 * (step - first) / max(1, last - first), 145 - 140 * (loss - low) / ((high - low) or 1)

    curve = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*item) for item in losses))
    # A single one is drawn as a short line.
    shown = (
        [[eval_losses[0][0] - (last - first) / 50, eval_losses[0][1]], *eval_losses] if len(eval_losses) == 1 else eval_losses
    )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*item) for item in shown))
    keys = "<span><i style='background:var(--blue)'></i>loss of the step</span>"
    if eval_losses:
        keys += f"<span><i style='background:var(--red)'></i>evaluation data, at last {eval_losses[-1][1]:.4f}</span>"
    style = "fill='none' stroke-width='2' vector-effect='non-scaling-stroke'"
    return (
        f"<section class=memory><h2>What was learned</h2><p class=faint>{_text(TrainingReport.from_dict(training))}</p>"
        f"<div class=keys>{keys}<span class=faint>{high:.3f} at the top, {low:.3f} at the bottom</span></div>"
        f"<svg class=tall viewBox='0 0 1000 150' preserveAspectRatio='none'><polyline points='{curve}' stroke='var(--blue)' "
        f"{style}/><polyline points='{line}' stroke='var(--red)' {style}/></svg>"
        f"<div class=axis><span>step {first}</span><span>step {last}</span></div></section>"
    )


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _bar(parts: Sequence[tuple[str, float, str]], whole: float) -> str:
    shown = [(name, value, colour) for name, value, colour in parts if value / whole >= 0.002]
    pieces = "".join(
        f"<i style='width:{100 * value / whole:.2f}%;background:var({colour})' title='{_text(name)}'></i>"
        for name, value, colour in shown
    )
    keys = "".join(
        f"<span><i style='background:var({colour})'></i>{_text(name)} {value / whole:.0%}</span>"
        for name, value, colour in shown
    )
    return f"<div class=bar>{pieces}</div><div class=keys>{keys}</div>"


def _timeline(trace: Trace, tracing: dict[str, Any]) -> str:
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
            rows.append(
                f"<div class=track><span>{_text(name)}</span>{_spans(resource, spans[:_SPANS_DRAWN], begin, end)}</div>"
            )
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
            f"fill='var({colour})' fill-opacity='{0.95 if index % 2 else 0.7}'><title>{_text(title)}</title></rect>"
        )
    return f"<svg viewBox='0 0 {_WIDTH} {_ROW}' preserveAspectRatio=none role=img>{''.join(rects)}</svg>"


def _links(report: dict[str, Any]) -> str:
    rows = []
    for name, link in report["links"].items():
        if link["bytes"]:
            speed, measured = link["bytes_per_second"], link["measured_bytes_per_second"]
            share = f"{speed / measured:.0%}" if speed and measured else ""
            rows.append((name, gib(link["bytes"]), duration(link["seconds"]), _rate(speed), _rate(measured), share))
    if not rows:
        return ""
    head = ("link", "moved", "busy", "speed", "possible", "reached")
    return f"<section><h2>Links</h2>{_table(head, rows)}</section>"


def _rate(value: float | None) -> str:
    return f"{value / 1e9:.2f} GB/s" if value else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns that nothing is in are left out."""
    used = [index for index in range(len(head)) if any(cells[index] for cells in rows)]
    head, rows = [head[index] for index in used], [[cells[index] for index in used] for cells in rows]

    def row(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}{' class=n' if i else ''}>{_text(c)}</{tag}>" for i, c in enumerate(cells)) + "</tr>"

    return f"<div class=scroll><table>{row('th', head)}{''.join(row('td', cells) for cells in rows)}</table></div>"


def _memory(record: Record) -> str:
    """What each tier held over time, one category on another."""
    parts = []
    end = max([record.trace.end_seconds, *(sample.seconds for sample in record.trace.memory)], default=0.0)
    for tier, use in record.report["tiers"].items():
        samples = [sample for sample in record.trace.memory if sample.tier == tier]
        if not samples or not end:
            continue
        top = max(use["budget_bytes"] or 0 if (use["budget_bytes"] or 0) < 3 * use["peak_bytes"] else 0, use["peak_bytes"])
        budget = f" of {gib(use['budget_bytes'])}" if use["budget_bytes"] else ""
        other = f", {gib(use['unaccounted_bytes'])} unaccounted" if use["unaccounted_bytes"] else ""
        parts.append(f"<p><b>{_text(tier)}</b> <span class=faint>peak {gib(use['peak_bytes'])}{budget}{other}</span></p>")
        parts.append(_areas(samples, end, top, use["budget_bytes"]))
    if not parts:
        return ""
    axis = f"<div class=axis><span>0</span><span>{duration(end)}</span></div>"
    return f"<section class=memory><h2>Memory over time</h2>{''.join(parts)}{axis}</section>"


def _areas(samples: Sequence[Any], end: float, top: int, budget: int | None) -> str:
    names = list(dict.fromkeys(sample.category for sample in samples))
    held = dict.fromkeys(names, 0)
    steps: list[tuple[float, dict[str, int]]] = [(0.0, dict(held))]
    for sample in samples:
        held[sample.category] = sample.nbytes
        steps.append((sample.seconds, dict(held)))
    steps.append((end, dict(held)))
    shapes = []
    for index in range(len(names)):
        upper = [(seconds, sum(values[name] for name in names[: index + 1])) for seconds, values in steps]
        lower = [(seconds, sum(values[name] for name in names[:index])) for seconds, values in steps]
        points = _stairs(upper, end, top) + _stairs(lower, end, top)[::-1]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        shapes.append(f"<polygon points='{path}' fill='var({_COLOURS[index % len(_COLOURS)]})'/>")
    if budget and budget <= top:
        y = 150 * (1 - budget / top)
        shapes.append(f"<line x1=0 x2={_WIDTH} y1='{y + 1:.1f}' y2='{y + 1:.1f}' stroke='var(--red)' stroke-dasharray='6 4'/>")
    keys = "".join(
        f"<span><i style='background:var({_COLOURS[index % len(_COLOURS)]})'></i>{_text(name)}</span>"
        for index, name in enumerate(names)
    )
    chart = f"<svg class=tall viewBox='0 0 {_WIDTH} 150' preserveAspectRatio=none role=img>{''.join(shapes)}</svg>"
    return f"{chart}<div class=keys>{keys}</div>"


def _stairs(steps: Sequence[tuple[float, int]], end: float, top: int) -> list[tuple[float, float]]:
    points: list[tuple[float, float]] = []
    for seconds, nbytes in steps:
        x, y = _WIDTH * seconds / end, 150 * (1 - nbytes / top)
        if points:
            points.append((x, points[-1][1]))
        points.append((x, y))
    return points


def _prediction(prediction: dict[str, Any] | None, peak: dict[str, Any]) -> str:
    if prediction is None:
        return ""
    rows = []
    for name, predicted, measured, error in (
        ("first prefill", "prefill_seconds", "prefill_measured_seconds", "prefill_error"),
        ("a token", "seconds_per_token", "measured_seconds_per_token", "seconds_per_token_error"),
    ):
        if prediction[measured] is not None:
            off = seconds_error(prediction[error], prediction[predicted], prediction[measured])
            rows.append((name, duration(prediction[predicted]), duration(prediction[measured]), off))
    if peak["measured_bytes"]:
        off = bytes_error(peak["predicted_bytes"], peak["measured_bytes"])
        rows.append(("peak of memory", gib(peak["predicted_bytes"]), gib(peak["measured_bytes"]), off))
    changes = [(item["change"], f"{item['speedup']:.2f}x") for item in prediction["what_if"]]
    more = f"<h2 style='margin-top:16px'>What would help</h2>{_table(('change', 'as fast'), changes)}" if changes else ""
    drifts = ", ".join(f"{_text(name)} {share:+.0%}" for name, share in prediction["drift"].items())
    without = seconds_error(prediction["model_error"], prediction["measured_seconds_per_token"])
    own = f"; without that drift the error of a token is {without}" if without else ""
    changed = f" Since the profile was made the links changed: {drifts}{own}." if drifts else ""
    return (
        f"<section><h2>Predicted and measured</h2>{_table(('', 'predicted', 'measured', 'error'), rows)}"
        f"<p class=faint>Bound by {_text(prediction['bound'])}.{changed}</p>{more}</section>"
    )


def _fallbacks(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    return (
        f"<section><h2>Slower than it could be</h2>{''.join(f'<p>{_text(sentence)}</p>' for sentence in sentences)}</section>"
    )
