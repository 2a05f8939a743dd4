"""The loop of `offload finetune`."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from torch import nn

from offload.finetune.data import Batches
from offload.finetune.recipe import Recipe
from offload.storage.errors import ConfigError, CorruptCheckpoint, TrainingError, foreign_file
from offload.training.optimizer.checkpoint import compare, read_manifest
from offload.training.weighting import item_count, token_shares

Batch = dict[str, torch.Tensor]

_FREE = ("epochs", "max_steps", "save_every", "evaluate_every", "layer_major")
"""The parts of a recipe that may differ when training is resumed: they change no step."""


class Trainable(Protocol):
    """What the loop needs of a session."""

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def backward(self, losses: list[Callable[[], torch.Tensor]], layer_major: bool = True) -> list[float]: ...

    def step(self, max_grad_norm: float | None = None, overlap: bool = False) -> float: ...

    def finish(self) -> None: ...

    def save(self, folder: str | Path, progress: dict[str, Any] | None = None) -> None: ...

    def resume(self, folder: str | Path) -> dict[str, Any] | None: ...


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of the optimizer found.

    Attributes:
        eval_loss: the mean loss of a token of the evaluation data, where it was computed after this step.
    """

    number: int
    loss: float
    gradient_norm: float
    tokens: int
    seconds: float
    eval_loss: float | None = None


def seed_everything(seed: int, step: int, micro_batch: int) -> None:
    """What a micro-batch draws depends on these alone, whatever came before."""
    torch.manual_seed(int(numpy.random.SeedSequence((seed, step, micro_batch)).generate_state(1, numpy.uint64)[0] >> 1))


def train(
    session: Trainable,
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    on_step: Callable[[Step], None] = lambda step: None,
    evaluation: Batches | None = None,
    checkpoints: Path | None = None,
    resume: bool = False,
    on_resumed: Callable[[int], None] = lambda step: None,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Train what requires a gradient.

    Args:
        model: the session's, or that with adapters.
        evaluation: told the loss of now and then; nothing is learned from it.
        checkpoints: where they are written, and resumed from.
        resume: go on from a checkpoint, if there is one.
        on_resumed: told the step of that checkpoint.
        stop: asked after each step; True ends the training there, with a checkpoint.

    Returns:
        The steps done, those before a checkpoint included.

    Raises:
        TrainingError: if the loss or a gradient is no number; the weights are those of the last good step, and in a checkpoint.
        ConfigError: if a checkpoint was made with other settings or data, or after more steps than are asked for.
    """
    if not any(value.requires_grad for value in model.parameters()):
        raise ConfigError("nothing is to be trained: no parameter requires a gradient")
    model.train()
    settings = {name: value for name, value in asdict(recipe).items() if name not in _FREE} | {"data": batches.identity}
    done = _resumed(session, checkpoints, settings) if resume and checkpoints is not None else 0
    saved, last = done, recipe.steps(batches)
    if done > last:
        raise ConfigError(
            f"the checkpoint was made after step {done}, and {last} steps are asked for; give more, or begin anew"
        )
    if done:
        on_resumed(done)
    for number, group in enumerate(_groups(batches, recipe), 1):
        if number > last:
            break
        if number <= done:
            continue
        begun = time.perf_counter()
        try:
            step = _step(session, model, group, recipe, number)
        except TrainingError:
            if checkpoints is not None and saved < number - 1:
                session.save(checkpoints, {"step": number - 1, "settings": settings})
            raise
        if recipe.save_every and checkpoints is not None and number % recipe.save_every == 0:
            session.save(checkpoints, {"step": number, "settings": settings})
            saved = number
        eval_loss = None
        if evaluation is not None and (number == last or (recipe.evaluate_every and number % recipe.evaluate_every == 0)):
            eval_loss = evaluate(model, evaluation)
        on_step(Step(number, *step, time.perf_counter() - begun, eval_loss))
        if number < last and stop():
            if checkpoints is not None and saved < number:
                session.save(checkpoints, {"step": number, "settings": settings})
            last = number
    session.finish()
    return last


def evaluate(model: nn.Module, batches: Batches) -> float:
    """The mean loss of a token."""
    total, counted = 0.0, 0
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches.in_order():
                tokens = item_count(batch)
                total += float(model(**batch, use_cache=False).loss) * tokens
                counted += tokens
    finally:
        model.train()
    return total / max(1, counted)


def _resumed(session: Trainable, folder: Path, settings: dict[str, Any]) -> int:
    manifest = read_manifest(folder)
    if manifest is not None:
        # First: of a model with adapters of another rank, the session could only say that it is another.
        with foreign_file(f"{folder} is no checkpoint of a fine-tuning", CorruptCheckpoint):
            compare("settings or data", manifest["progress"].get("settings", {}), settings)
    progress = session.resume(folder)
    return int(progress["step"]) if progress else 0


def _step(session: Trainable, model: nn.Module, group: list[Batch], recipe: Recipe, number: int) -> tuple[float, float, int]:
    session.optimizer.param_groups[0]["lr"] = recipe.rate(number)
    shares = token_shares(group)
    losses = session.backward(
        [
            partial(_loss, model, batch, recipe.seed, number, index, share)
            for index, (batch, share) in enumerate(zip(group, shares, strict=True))
        ],
        recipe.layer_major,
    )
    loss = sum(losses)
    if not math.isfinite(loss):
        session.optimizer.zero_grad()
        raise TrainingError(
            f"step {number}: the loss is {loss}. The weights are those of the step before; give a smaller learning rate, or "
            "look at the data"
        )
    try:
        norm = session.step(recipe.max_grad_norm, overlap=True)
    except TrainingError as error:
        raise TrainingError(f"step {number}: the loss is {loss}, and {error}") from error
    return loss, norm, sum(int(batch["labels"].numel()) for batch in group)


def _loss(model: nn.Module, batch: Batch, seed: int, step: int, micro_batch: int, share: float) -> torch.Tensor:
    seed_everything(seed, step, micro_batch)
    loss: torch.Tensor = model(**batch, use_cache=False).loss * share
    return loss


def _groups(batches: Batches, recipe: Recipe) -> Iterator[list[Batch]]:
    """The batches of each step; the last group of an epoch may have fewer."""
    for epoch in range(recipe.epochs):
        group: list[Batch] = []
        for batch in batches.epoch(epoch):
            group.append(batch)
            if len(group) == recipe.gradient_accumulation:
                yield group
                group = []
        if group:
            yield group
