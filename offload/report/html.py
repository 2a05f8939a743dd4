"""A run as one page: no script, no request to anywhere, light and dark, phone and desktop."""

from collections.abc import Sequence
from typing import Any

from offload.report.experts import ExpertUse
from offload.report.facts import bytes_error, seconds_error, short_name
from offload.report.html_memory import memory
from offload.report.html_parts import table, text
from offload.report.html_time import timeline, times
from offload.report.kv import kv_sentences
from offload.report.record import Record
from offload.report.training import TrainingReport
from offload.storage.errors import duration, gib

_STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --ink: #1d1d1f; --faint: #6a6a70; --line: #e2e2de; --panel: #ffffff;
  --blue: #3b76c4; --orange: #d9812e; --green: #4b9a57; --violet: #8263b3; --pink: #c9648e; --teal: #2f9494; --brown: #94694b;
  --grey: #a7a7ad; --red: #c8473c;
  --oak: #8a6a4a; --sand: #cbb08c; --plum: #7d4a68; --rose: #d698ae; --moss: #8d9a5b; --slate: #5f7183; --clay: #b5715a;
  --mist: #a9bac6; }
@media (prefers-color-scheme: dark) { :root { --paper: #161618; --ink: #ececee; --faint: #9d9da6; --line: #34343a;
  --panel: #1f1f23; --blue: #6ba3ea; --orange: #efa25a; --green: #72c27f; --violet: #ab8fdb; --pink: #e58fb3; --teal: #5cc0c0;
  --brown: #c29878; --grey: #74747c; --red: #ec7469;
  --oak: #b28d69; --sand: #e2cdaf; --plum: #a8718f; --rose: #e8b4c6; --moss: #b3c07f; --slate: #8ca0b3; --clay: #d4937d;
  --mist: #5c6d79; } }
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
.chart { display: grid; grid-template-columns: 68px 1fr; gap: 8px; } .scale { display: flex; flex-direction: column;
  justify-content: space-between; height: 150px; color: var(--faint); font-size: 12px; }
code { font-size: 13px; overflow-wrap: anywhere; }
"""


def as_html(record: Record) -> str:
    """The whole page."""
    report = record.report
    title = f"{short_name(report['model'])} on {report['device']}"
    body = "".join(
        (
            f"<h1>{text(title)}</h1>",
            f"<p class=faint>{gib(report['weight_bytes'])} of weights; {text(_blocks(report))}; "
            f"exactness {text(report['exactness'])}</p>",
            _made_by(report),
            _cards(report),
            times(report),
            _learning(report.get("training")),
            _kv(report["kv"]),
            _experts(report.get("experts")),
            timeline(record.trace, report["tracing"]),
            _links(report),
            memory(record),
            _prediction(report.get("prediction"), report["peak"]),
            _fallbacks(report["fallbacks"]),
        )
    )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{text(title)}</title><style>{_STYLE}</style></head><body>{body}</body></html>"
    )


def _made_by(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.get("versions", {}).items())
    command = f"<p><code>{text(report['command'])}</code></p>" if report.get("command") else ""
    return f"{command}<p class=faint>{text(versions)}</p>"


def _blocks(report: dict[str, Any]) -> str:
    return "blocks: " + ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in report["blocks"].items() if number)


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
    return f"<div class=cards>{''.join(f'<div class=card><b>{text(value)}</b><span>{text(name)}</span></div>' for value, name in facts)}</div>"


def _kv(content: dict[str, Any]) -> str:
    said = "".join(f"<p>{text(sentence)}</p>" for sentence in kv_sentences(content))
    return f"<section><h2>KV cache</h2>{said}</section>" if said else ""


def _experts(content: dict[str, Any] | None) -> str:
    if content is None:
        return ""
    use = ExpertUse.from_dict(content)
    rows = [
        f"<tr><td>{text(layer.layer)}</td><td class=n>{layer.choices:,}</td>"
        f"<td class=n>{layer.hits / max(1, layer.choices):.1%}</td><td class=n>{layer.copies:,}</td>"
        f"<td class=n>{gib(layer.copied_bytes)}</td><td class=n>{layer.computed_on_cpu:,}</td></tr>"
        for layer in use.layers
    ]
    said = "".join(f"<p>{text(sentence)}</p>" for sentence in use.sentences())
    names = "".join(f"<th class=n>{name}</th>" for name in ("asked for", "were there", "brought", "bytes", "on the CPU"))
    table = f"<table><tr><th>layer</th>{names}</tr>{''.join(rows)}</table>"
    return f"<section><h2>Experts</h2>{said}<details><summary>by layer</summary><div class=scroll>{table}</div></details></section>"


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
        f"<section class=memory><h2>What was learned</h2><p class=faint>{text(TrainingReport.from_dict(training))}</p>"
        f"<div class=keys>{keys}<span class=faint>{high:.3f} at the top, {low:.3f} at the bottom</span></div>"
        f"<svg class=tall viewBox='0 0 1000 150' preserveAspectRatio='none'><polyline points='{curve}' stroke='var(--blue)' "
        f"{style}/><polyline points='{line}' stroke='var(--red)' {style}/></svg>"
        f"<div class=axis><span>step {first}</span><span>step {last}</span></div></section>"
    )


def _rate(value: float | None) -> str:
    return f"{value / 1e9:.2f} GB/s" if value else ""


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
    return f"<section><h2>Links</h2>{table(head, rows)}</section>"


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
    more = f"<h2 style='margin-top:16px'>What would help</h2>{table(('change', 'as fast'), changes)}" if changes else ""
    drifts = ", ".join(f"{text(name)} {share:+.0%}" for name, share in prediction["drift"].items())
    without = seconds_error(prediction["model_error"], prediction["measured_seconds_per_token"])
    own = f"; without that drift the error of a token is {without}" if without else ""
    changed = f" Since the profile was made the links changed: {drifts}{own}." if drifts else ""
    return (
        f"<section><h2>Predicted and measured</h2>{table(('', 'predicted', 'measured', 'error'), rows)}"
        f"<p class=faint>Bound by {text(prediction['bound'])}.{changed}</p>{more}</section>"
    )


def _fallbacks(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    return f"<section><h2>Slower than it could be</h2>{''.join(f'<p>{text(sentence)}</p>' for sentence in sentences)}</section>"
