"""What a training learned, and what it took: a part of the report."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from offload.report.schema import RENAMED
from offload.scheduler.renamed import Renamed
from offload.storage.errors import counted, duration, gib


@dataclass(frozen=True, slots=True)
class TrainingEstimate(Renamed):
    """What is known before the first step.

    Attributes:
        trained: parameters.
        gradient_bytes, state_bytes: in CPU memory; states on NVMe pass through buffers there.
        activation_bytes: layer inputs that are kept for backward.
        activation_tier: where they are kept.
        disk_bytes: of one version of states and weights on NVMe.
        written_bytes: to disk, in each step.
        step_seconds: predicted; None without a hardware profile.
    """

    RENAMED: ClassVar[Mapping[str, str]] = RENAMED["training.estimate"]

    trained: int
    gradient_bytes: int
    state_bytes: int
    activation_bytes: int
    activation_tier: str
    disk_bytes: int
    written_bytes: int
    step_seconds: float | None

    def __str__(self) -> str:
        placed = [f"gradients {gib(self.gradient_bytes)} and optimizer {gib(self.state_bytes)} in CPU memory"]
        if self.disk_bytes:
            placed.append(f"states and weights {gib(self.disk_bytes)} on NVMe")
        placed.append(f"layer inputs {gib(self.activation_bytes)} ({self.activation_tier})")
        time = "run `offload probe` once to have it predicted" if self.step_seconds is None else duration(self.step_seconds)
        return (
            f"{self.trained:,} parameters are trained: {'; '.join(placed)}\n"
            f"written to the SSD in each step: {gib(self.written_bytes)}; predicted time of a step: {time}"
        )


@dataclass(frozen=True, slots=True)
class TrainingReport(Renamed):
    """A training so far.

    Attributes:
        losses: [step, loss] of each.
        eval_losses: [step, mean loss of a token] of the evaluation data.
        tokens, seconds: of all steps.
        step_seconds: the median of a step.
    """

    RENAMED: ClassVar[Mapping[str, str]] = RENAMED["training"]

    method: str
    estimate: TrainingEstimate
    losses: list[list[float]] = field(default_factory=list)
    eval_losses: list[list[float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "TrainingReport":
        return cls(**(content | {"estimate": TrainingEstimate(**content["estimate"])}))

    def __str__(self) -> str:
        if not self.losses:
            return "training: no step"
        first, last = self.losses[0][1], self.losses[-1][1]
        steps = counted(len(self.losses), "step")
        said = f"training: {steps}, loss {first:.4f} to {last:.4f}, {duration(self.step_seconds)} a step"
        if self.estimate.step_seconds is not None:
            said += f" ({duration(self.estimate.step_seconds)} predicted)"
        if self.seconds:
            said += f", {self.tokens / self.seconds:.0f} tokens/s"
        said += f", {gib(self.estimate.written_bytes)} written to the SSD a step"
        if self.eval_losses:
            said += f"; evaluation {self.eval_losses[-1][1]:.4f}"
        return said
