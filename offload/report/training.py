"""What a training learned, and what it took: a part of the report."""

from dataclasses import dataclass, field
from typing import Any

from offload.storage.errors import duration, gib


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is known before the first step.

    Attributes:
        trained: parameters.
        gradient_bytes, state_bytes: in CPU memory; states on NVMe pass through buffers there.
        kept_bytes: the inputs of all layers, which wait for backward.
        kept_on: where they do.
        disk_bytes: of one version of states and weights on NVMe.
        written_bytes: to disk, in each step.
        step_seconds: predicted; None without a hardware profile.
    """

    trained: int
    gradient_bytes: int
    state_bytes: int
    kept_bytes: int
    kept_on: str
    disk_bytes: int
    written_bytes: int
    step_seconds: float | None

    def __str__(self) -> str:
        placed = [f"gradients {gib(self.gradient_bytes)} and optimizer {gib(self.state_bytes)} in CPU memory"]
        if self.disk_bytes:
            placed.append(f"states and weights {gib(self.disk_bytes)} on NVMe")
        placed.append(f"layers' inputs {gib(self.kept_bytes)} ({self.kept_on})")
        time = "run `offload probe` once to have it predicted" if self.step_seconds is None else duration(self.step_seconds)
        return (
            f"{self.trained:,} parameters are trained: {'; '.join(placed)}\n"
            f"written to the SSD in each step: {gib(self.written_bytes)}; predicted time of a step: {time}"
        )


@dataclass(frozen=True, slots=True)
class Learning:
    """A training so far.

    Attributes:
        losses: [step, loss] of each.
        evaluated: [step, mean loss of a token] of the evaluation data.
        tokens, seconds: of all steps.
        step_seconds: the median of a step.
    """

    method: str
    outlook: Outlook
    losses: list[list[float]] = field(default_factory=list)
    evaluated: list[list[float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Learning":
        return cls(**(content | {"outlook": Outlook(**content["outlook"])}))

    def __str__(self) -> str:
        if not self.losses:
            return "training: no step"
        first, last = self.losses[0][1], self.losses[-1][1]
        said = f"training: {len(self.losses)} steps, loss {first:.4f} to {last:.4f}, {duration(self.step_seconds)} a step"
        if self.outlook.step_seconds is not None:
            said += f" ({duration(self.outlook.step_seconds)} predicted)"
        if self.seconds:
            said += f", {self.tokens / self.seconds:.0f} tokens/s"
        said += f", {gib(self.outlook.written_bytes)} written to the SSD a step"
        if self.evaluated:
            said += f"; evaluation {self.evaluated[-1][1]:.4f}"
        return said
