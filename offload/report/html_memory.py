"""What each tier held over time, on the page."""

from collections.abc import Sequence
from typing import Any

from offload.report.html_parts import text
from offload.report.record import Record
from offload.storage.errors import duration, gib

_WIDTH, _HEIGHT = 1000, 150
_COLOURS = {
    "resident weights": "--oak",
    "experts": "--plum",
    "slots": "--sand",
    "KV cache": "--rose",
    "activations": "--moss",
    "weights": "--oak",
}
"""Other colours than those of the resources: these say what bytes are, those what time went to."""
_OTHERS = ("--slate", "--clay", "--mist")
_LEAST_SHARE = 0.005
"""Less of the scale is not seen, so it is not named."""


def memory(record: Record) -> str:
    """Draw what each tier held over time, one category on another."""
    end = max([record.trace.end_seconds, *(sample.seconds for sample in record.trace.memory)], default=0.0)
    parts = []
    for tier, use in record.report["tiers"].items():
        samples = [sample for sample in record.trace.memory if sample.tier == tier]
        if not samples or not end:
            continue
        budget, peak = use["budget_bytes"] or 0, use["peak_bytes"]
        top = max(budget if budget < 3 * peak else 0, peak)
        said = f"peak {gib(peak)}" + (f" of a budget of {gib(budget)}" if budget else "")
        other = f", {gib(use['unaccounted_bytes'])} unaccounted" if use["unaccounted_bytes"] else ""
        parts.append(f"<p><b>{text(tier)}</b> <span class=faint>{said}{other}</span></p>")
        parts.append(_chart(_Held(samples, end), top, budget))
    return f"<section class=memory><h2>Memory over time</h2>{''.join(parts)}</section>" if parts else ""


class _Held:
    """Bytes of each category over time.

    Args:
        samples: one for each change.
        end: seconds, of the last that is drawn.
    """

    def __init__(self, samples: Sequence[Any], end: float) -> None:
        self.end = end
        self.names = list(dict.fromkeys(sample.category for sample in samples))
        held = dict.fromkeys(self.names, 0)
        self.steps: list[tuple[float, dict[str, int]]] = [(0.0, dict(held))]
        for sample in samples:
            held[sample.category] = sample.nbytes
            self.steps.append((sample.seconds, dict(held)))
        self.steps.append((end, dict(held)))

    def most(self, name: str) -> int:
        """The most bytes of a category at once."""
        return max(values[name] for _, values in self.steps)

    def below(self, count: int) -> list[tuple[float, int]]:
        """The bytes of the first `count` categories together, over time."""
        return [(seconds, sum(values[name] for name in self.names[:count])) for seconds, values in self.steps]


def _chart(held: _Held, top: int, budget: int) -> str:
    colours = _colours(held.names)
    shapes = []
    for index, name in enumerate(held.names):
        points = _stairs(held.below(index + 1), held.end, top) + _stairs(held.below(index), held.end, top)[::-1]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        shapes.append(f"<polygon points='{path}' fill='var({colours[name]})'><title>{text(name)}</title></polygon>")
    if 0 < budget <= top:
        y = _HEIGHT * (1 - budget / top) + 1
        shapes.append(f"<line x1=0 x2={_WIDTH} y1='{y:.1f}' y2='{y:.1f}' stroke='var(--red)' stroke-dasharray='6 4'/>")
    chart = f"<svg class=tall viewBox='0 0 {_WIDTH} {_HEIGHT}' preserveAspectRatio=none role=img>{''.join(shapes)}</svg>"
    scale = f"<div class=scale><span>{gib(top)}</span><span>{gib(top // 2)}</span><span>0</span></div>"
    axis = f"<div class=axis><span>0</span><span>{duration(held.end / 2)}</span><span>{duration(held.end)}</span></div>"
    keys = "".join(
        f"<span><i style='background:var({colours[name]})'></i>{text(name)}, at most {gib(held.most(name))}</span>"
        for name in held.names
        if held.most(name) >= _LEAST_SHARE * top
    )
    return f"<div class=chart>{scale}<div>{chart}{axis}</div></div><div class=keys>{keys}</div>"


def _colours(names: Sequence[str]) -> dict[str, str]:
    others = iter(_OTHERS * (1 + len(names) // len(_OTHERS)))
    return {name: _COLOURS.get(name) or next(others) for name in names}


def _stairs(steps: Sequence[tuple[float, int]], end: float, top: int) -> list[tuple[float, float]]:
    points: list[tuple[float, float]] = []
    for seconds, nbytes in steps:
        x, y = _WIDTH * seconds / end, _HEIGHT * (1 - nbytes / top)
        if points:
            points.append((x, points[-1][1]))
        points.append((x, y))
    return points
