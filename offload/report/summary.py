"""The report in a few lines: how fast, how much memory, and what held it back."""

from typing import TYPE_CHECKING

from offload.report.facts import LEAST_JUDGED_SECONDS, PhaseUse
from offload.storage.errors import duration, gib

if TYPE_CHECKING:
    from offload.report.report import Report

_WORTH_NAMING = 1.05
"""Times as fast: less is no help."""


def summary(report: "Report") -> str:
    """Three lines, and one for each fallback."""
    speed = f"speed: {_speed(report)}; exactness {report.exactness}"
    lines = [speed, f"memory: {_memory(report)}", f"bound by: {_bound(report)}"]
    return "\n".join([*lines, *(f"fell back: {sentence}" for sentence in report.fallbacks)])


def _speed(report: "Report") -> str:
    if report.training is not None:
        return str(report.training).removeprefix("training: ")
    prefill, decode = report.prefill, report.decode
    if not prefill.passes and not decode.passes:
        return "nothing was computed yet"
    said = []
    if decode.tokens_per_second and decode.seconds_per_token:
        said.append(f"{decode.tokens_per_second:.2f} tokens/s ({duration(decode.seconds_per_token)} each)")
    if prefill.passes:
        said.append(f"first token after {duration(report.loading_seconds + prefill.first_seconds)}")
    return ", ".join(said)


def _memory(report: "Report") -> str:
    held = [
        f"{gib(tier.peak_bytes)} of {name.upper()} memory at the peak"
        + ("" if tier.budget_bytes is None else f" (budget {gib(tier.budget_bytes)})")
        for name, tier in report.tiers.items()
        if name != "nvme" and (tier.budget_bytes or tier.peak_bytes)
    ]
    streamed, experts = report.streamed_bytes_per_pass, report.experts
    moved = [f"{gib(streamed)} of {gib(report.weight_bytes)} of weights streamed a pass"] if streamed else []
    if experts is not None:
        found = experts.hits / max(1, experts.choices)
        moved.append(f"{experts.slots:,} of {experts.experts:,} experts stay, {found:.0%} of those asked for were there")
    return "; ".join([*held, *(moved or ["nothing is streamed"])])


def _bound(report: "Report") -> str:
    name, phase = _main_phase(report)
    causes = time_by_cause(phase)
    if not phase.seconds:
        return "nothing yet"
    cause = max(causes, key=lambda each: causes[each])
    said = f"{cause} ({causes[cause] / phase.seconds:.0%} of {name})"
    predicted, step = report.prediction, phase.seconds / max(1, phase.passes)
    # What a process does beside is as much as a shorter pass: nothing is predicted of it that is worth saying.
    judged = predicted is not None and step >= LEAST_JUDGED_SECONDS
    helpful = [item for item in predicted.what_if if item.speedup >= _WORTH_NAMING] if judged and predicted else []
    if helpful:
        best = max(helpful, key=lambda item: item.speedup)
        said += f"; would help: {best.change} ({best.speedup:.2f}x as fast)"
    return said


def _main_phase(report: "Report") -> tuple[str, PhaseUse]:
    phases = {
        "decode": report.decode,
        "backward": report.backward,
        "prefill": report.prefill,
        "work outside of the forward": report.standalone,
    }
    name = max(phases, key=lambda each: phases[each].seconds)
    return name, phases[name]


def time_by_cause(use: PhaseUse) -> dict[str, float]:
    """Seconds of a phase, by what they went to."""
    spent = {"compute": use.compute_seconds, **{f"waiting for {name}": wait for name, wait in use.wait_seconds.items()}}
    return spent | {"offload's own work": use.overhead_seconds, "between blocks": use.other_seconds}
