"""Shows the steps of a training while they are done, and remembers them."""

import statistics

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from offload.cli.terminal import say
from offload.finetune.loop import Step
from offload.finetune.recipe import Recipe
from offload.report.training import TrainingEstimate, TrainingReport


class TrainingProgress:
    """A bar on a terminal, else a line a step; at the end, what the report says of the training."""

    def __init__(self, recipe: Recipe, estimate: TrainingEstimate, total: int, quiet: bool) -> None:
        self._console = Console(stderr=True)
        self._quiet, self._total = quiet, total
        self._recipe, self._estimate = recipe, estimate
        self._steps: list[Step] = []
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
        )
        drawn = not quiet and self._console.is_terminal
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not drawn)
        self._task = self._bar.add_task("training", total=total)

    def __enter__(self) -> None:
        self._bar.start()

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def on_resumed(self, step: int) -> None:
        """Tell where training goes on; nothing is left to be done after the last step."""
        self._bar.update(self._task, completed=step)
        if self._quiet:
            return
        if step < self._total:
            say(f"resumed from the checkpoint of step {step} of {self._total}")
        else:
            say(f"all {self._total} steps are in the checkpoint: nothing is left to train; a larger --epochs goes on")

    def on_step(self, step: Step) -> None:
        self._steps.append(step)
        line = f"step {step.number}: loss {step.loss:.4f}, gradient norm {step.gradient_norm:.3f}, "
        line += f"{step.tokens / step.seconds:.0f} tokens/s"
        if step.eval_loss is not None:
            line += f", evaluation {step.eval_loss:.4f}"
        self._bar.update(self._task, completed=step.number, description=line)
        if not self._quiet and not self._console.is_terminal:
            say(line)

    def training_report(self) -> TrainingReport:
        return TrainingReport(
            method=self._recipe.method,
            estimate=self._estimate,
            losses=[[step.number, step.loss] for step in self._steps],
            eval_losses=[[step.number, step.eval_loss] for step in self._steps if step.eval_loss is not None],
            tokens=sum(step.tokens for step in self._steps),
            seconds=sum(step.seconds for step in self._steps),
            step_seconds=statistics.median(step.seconds for step in self._steps) if self._steps else 0.0,
        )
