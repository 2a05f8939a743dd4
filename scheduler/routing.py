"""Which experts each token chose, layer by layer: as recorded, and as kept in a file.

The file is CSV behind comment lines that tell the sizes; other tools write the same format (`docs/experts.md`).
"""

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from offload.storage.errors import ConfigError

FORMAT = "route_trace v1"
_MOST = 1 << 16
"""Layers of a model, or experts of a layer: none has as many."""

COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert", "weight", "residency", "expert_bytes")
PREFILL, DECODE = 0, 1


@dataclass(frozen=True, slots=True)
class Visit:
    """One token at the router of one layer.

    Attributes:
        phase: `PREFILL` or `DECODE`.
        step: of the token, counted over a turn.
        experts, weights: the choices, the heaviest first.
        resident: which of them were in device memory when they were asked for.
    """

    turn: int
    phase: int
    step: int
    layer: int
    experts: tuple[int, ...]
    weights: tuple[float, ...]
    resident: tuple[bool, ...] = ()


@dataclass(slots=True)
class Routing:
    """A recorded run.

    Attributes:
        model: its name.
        layers, experts: how many layers have experts, and how many each.
        expert_bytes: of one expert, by layer.
        visits: in the order in which they happened.
    """

    model: str
    layers: int
    experts: int
    expert_bytes: tuple[int, ...]
    visits: list[Visit] = field(default_factory=list)

    def save(self, path: str | Path) -> None:
        with open(path, "w", newline="") as file:
            chosen = max((len(visit.experts) for visit in self.visits), default=0)
            file.write(
                f"# {FORMAT}\n# model={self.model} n_layer={self.layers} n_expert={self.experts} n_expert_used={chosen}\n"
            )
            for layer, nbytes in enumerate(self.expert_bytes):
                file.write(f"# layer={layer} expert_bytes={nbytes}\n")
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(self._rows())

    def _rows(self) -> Iterator[tuple[object, ...]]:
        for visit in self.visits:
            resident = visit.resident or (False,) * len(visit.experts)
            for slot, (expert, weight, there) in enumerate(zip(visit.experts, visit.weights, resident, strict=True)):
                read = 0 if there else self.expert_bytes[visit.layer]
                yield visit.turn, visit.phase, visit.step, visit.layer, slot, expert, f"{weight:.6g}", int(there), read

    @classmethod
    def load(cls, path: str | Path) -> "Routing":
        """Read a trace.

        Raises:
            ConfigError: for a file that is none, with the line that is wrong.
        """
        try:
            with open(path, newline="") as file:
                return cls._parse(str(path), list(enumerate(file, 1)))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read as a routing trace: {error}") from error

    @classmethod
    def _parse(cls, path: str, lines: list[tuple[int, str]]) -> "Routing":
        given = " ".join(line for _, line in lines if line.startswith("#"))
        sizes = {int(layer): int(nbytes) for layer, nbytes in re.findall(r"layer=(\d+) expert_bytes=(\d+)", given)}
        content = [(number, line) for number, line in lines if line.strip() and not line.startswith("#")]
        if not content or tuple(content[0][1].strip().split(",")) != COLUMNS:
            raise ConfigError(f"{path} is no routing trace: its first row must be {','.join(COLUMNS)}")
        visits, largest = _visits(path, content[1:])
        if not visits:
            raise ConfigError(f"{path} is a routing trace without a single choice")
        layers = max(visit.layer for visit in visits) + 1
        if max(layers, *(max(visit.experts) for visit in visits)) > _MOST:
            raise ConfigError(f"{path} is no routing trace: it has more than {_MOST:,} layers or experts")
        named = re.search(r"n_expert=(\d+)", given)
        experts = max(int(named[1]) if named else 0, 1 + max(max(visit.experts) for visit in visits))
        model = re.search(r"model=(\S+)", given)
        expert_bytes = tuple(sizes.get(layer, largest.get(layer, 0)) for layer in range(layers))
        return cls(model[1] if model else Path(path).stem, layers, experts, expert_bytes, visits)


def _visits(path: str, rows: Iterable[tuple[int, str]]) -> tuple[list[Visit], dict[int, int]]:
    """The visits, and the most bytes that a row tells of each layer."""
    open_rows: dict[tuple[int, int, int, int], list[tuple[int, float, bool]]] = {}
    largest: dict[int, int] = {}
    for number, line in rows:
        cells = line.strip().split(",")
        try:
            turn, phase, step, layer, _, expert, _, resident, nbytes = (
                int(cell) if column != "weight" else 0 for column, cell in zip(COLUMNS, cells, strict=True)
            )
            weight = float(cells[COLUMNS.index("weight")])
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: {line.strip()!r} is no row of a routing trace ({error})") from error
        if min(turn, step, layer, expert) < 0 or phase not in (PREFILL, DECODE):
            raise ConfigError(f"{path}, line {number}: {line.strip()!r} has a negative number, or a phase other than 0 and 1")
        open_rows.setdefault((turn, step, layer, phase), []).append((expert, weight, bool(resident)))
        largest[layer] = max(largest.get(layer, 0), nbytes)
    visits = []
    for (turn, step, layer, phase), chosen in open_rows.items():
        experts, weights, resident_flags = zip(*chosen, strict=True)
        visits.append(Visit(turn, phase, step, layer, experts, weights, resident_flags))
    return visits, largest
