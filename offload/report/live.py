"""A run as it goes, in the terminal."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from offload.report.facts import LinkUse, PhaseUse, TierUse
from offload.storage.errors import duration, gib

_UPDATES_PER_SECOND = 4
_BAR_WIDTH = 24
_LINES = 6
"""Lines of the text's end that are shown."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A session at one moment; cheap to take, from any thread.

    Attributes:
        phase: `prefill`, `decode`, or `outside` of any pass.
        links: without the links' own speeds, which take a measurement.
    """

    phase: str
    tiers: dict[str, TierUse]
    links: dict[str, LinkUse]
    phases: dict[str, PhaseUse]


class LiveView:
    """Draws snapshots a few times a second, until the end of its `with` block.

    Args:
        take: gives the present snapshot.
    """

    def __init__(self, take: Callable[[], Snapshot], console: Console) -> None:
        self._take = take
        self._text = ""
        self._ended = 0
        self._tokens = 0
        self._begun = time.monotonic()
        self._before: tuple[float, dict[str, int]] = (self._begun, {})
        self._rates: dict[str, float] = {}
        self._live = Live(
            console=console, get_renderable=self._draw, refresh_per_second=_UPDATES_PER_SECOND, transient=True, screen=False
        )

    def __enter__(self) -> "LiveView":
        self._live.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the view away. Nothing happens the second time."""
        self._live.stop()

    def add_text(self, text: str) -> None:
        self._text += text

    def end_text(self) -> None:
        """What was added is a whole answer; what follows is another."""
        self._text += "\n\n"
        self._ended = len(self._text)

    @property
    def unfinished(self) -> str:
        """The answer that is being added."""
        return self._text[self._ended :]

    def add_tokens(self, count: int) -> None:
        self._tokens += count

    def _draw(self) -> RenderableType:
        now = self._take()
        self._note_rates(now)
        ended = "\n".join(self._text.splitlines()[-_LINES:])
        return Group(self._headline(now), _tiers(now), self._links(now), _times(now), Text(ended, style="bold"))

    def _headline(self, now: Snapshot) -> Text:
        decode = now.phases["decode"]
        speed = f", {decode.tokens_per_second:.2f} a second for each sequence" if decode.tokens_per_second else ""
        elapsed = duration(time.monotonic() - self._begun)
        return Text(f"{now.phase}: {self._tokens} tokens in {elapsed}{speed}")

    def _note_rates(self, now: Snapshot) -> None:
        """Note the speed of the links since the last time, smoothed a little."""
        at, before = self._before
        moment = time.monotonic()
        if moment - at < 1 / _UPDATES_PER_SECOND / 2:
            return
        for name, use in now.links.items():
            rate = (use.bytes - before.get(name, 0)) / (moment - at)
            self._rates[name] = 0.5 * self._rates.get(name, rate) + 0.5 * rate
        self._before = moment, {name: use.bytes for name, use in now.links.items()}

    def _links(self, now: Snapshot) -> Table:
        table = _rows()
        for name, use in now.links.items():
            table.add_row(name, f"{self._rates.get(name, 0.0) / 1e9:.2f} GB/s", f"{gib(use.bytes)} moved")
        return table


def _tiers(now: Snapshot) -> Table:
    table = _rows()
    for name, tier in now.tiers.items():
        if tier.budget_bytes:
            bar = ProgressBar(total=tier.budget_bytes, completed=tier.used_bytes, width=_BAR_WIDTH)
            table.add_row(f"{name} memory", bar, f"{gib(tier.used_bytes)} of {gib(tier.budget_bytes)}")
    return table


def _times(now: Snapshot) -> Table:
    table = _rows()
    for name in ("prefill", "decode"):
        use = now.phases[name]
        if not use.seconds:
            continue
        parts = {
            "compute": use.compute_seconds,
            "offload's own work": use.overhead_seconds,
            "between blocks": use.other_seconds,
        }
        parts |= {f"waiting for {link}": seconds for link, seconds in use.wait_seconds.items()}
        shares = sorted(parts.items(), key=lambda item: -item[1])
        table.add_row(name, ", ".join(f"{cause} {seconds / use.seconds:.0%}" for cause, seconds in shares if seconds))
    return table


def _rows() -> Table:
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column()
    return table
