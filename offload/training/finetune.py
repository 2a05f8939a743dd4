"""Adapters (LoRA, arXiv 2106.09685) trained on a model whose weights are streamed."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.training.data import Batches
from storage.errors import ConfigError, TrainingError


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train.

    Attributes:
        rank, alpha, dropout, target_modules: of the adapters, as peft takes them.
        warmup: steps in which the learning rate rises to what was given; it stays there.
        gradient_accumulation: batches whose gradients one step adds up.
        max_steps: 0 for as many as the epochs have.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str = "all-linear"
    learning_rate: float = 2e-4
    epochs: int = 1
    max_steps: int = 0
    gradient_accumulation: int = 1
    max_grad_norm: float = 1.0
    warmup: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "epochs", "gradient_accumulation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("alpha", "learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must be a positive number")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} must be at least 0 and below 1")
        if min(self.max_steps, self.warmup, self.seed) < 0:
            raise ConfigError("max_steps, warmup and seed must be at least 0")

    def steps(self, batches: Batches) -> int:
        """Of the optimizer, in all."""
        whole = self.epochs * -(-len(batches) // self.gradient_accumulation)
        return min(whole, self.max_steps) if self.max_steps else whole


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of the optimizer found."""

    number: int
    loss: float
    gradient_norm: float
    tokens: int


def with_adapters(model: nn.Module, recipe: Recipe) -> Any:
    """The model as peft wraps it, with new adapters, which alone are trained.

    Raises:
        ConfigError: if peft finds nothing to adapt.
    """
    peft = _peft()
    modules = recipe.target_modules
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=modules if modules == "all-linear" else modules.split(","),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(recipe.seed)
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"target_modules={modules} cannot be adapted: {str(error).splitlines()[0]}") from error


def train(model: nn.Module, batches: Batches, recipe: Recipe, on_step: Callable[[Step], None]) -> None:
    """Train what requires a gradient.

    Raises:
        TrainingError: if the loss or a gradient is no number; the weights are those of the last good step.
    """
    parameters = [value for value in model.parameters() if value.requires_grad]
    if not parameters:
        raise ConfigError("nothing is to be trained: no parameter requires a gradient")
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, fused=True)
    model.train()
    last = recipe.steps(batches)
    for number, group in enumerate(_groups(batches, recipe), 1):
        losses, tokens = [], 0
        for index, batch in enumerate(group):
            # Each forward draws what it draws, whatever came before.
            torch.manual_seed(hash((recipe.seed, number, index)) & 0x7FFFFFFF)
            loss = model(**batch).loss / len(group)
            loss.backward()
            losses.append(loss.item())
            tokens += int(batch["attention_mask"].sum())
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm))
        if not math.isfinite(sum(losses)) or not math.isfinite(norm):
            raise TrainingError(
                f"step {number}: the loss is {sum(losses)} and the norm of the gradients {norm}. The weights are those of the "
                "step before; give a smaller learning_rate, or look at the data"
            )
        for settings in optimizer.param_groups:
            settings["lr"] = recipe.learning_rate * min(1.0, number / max(1, recipe.warmup))
        optimizer.step()
        optimizer.zero_grad()
        on_step(Step(number, sum(losses), norm, tokens))
        if number == last:
            return


def _groups(batches: Batches, recipe: Recipe) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The batches of each step; the last group of an epoch may have fewer."""
    for epoch in range(recipe.epochs):
        group: list[dict[str, torch.Tensor]] = []
        for batch in batches.epoch(epoch):
            group.append(batch)
            if len(group) == recipe.gradient_accumulation:
                yield group
                group = []
        if group:
            yield group


def save_adapters(adapted: Any, folder: str | Path) -> None:
    """As peft does, beside the place and then in it: a folder is whole, or not there."""
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    adapted.save_pretrained(str(partial), save_embedding_layers=False)
    if folder.exists():
        for file in partial.iterdir():
            file.rename(folder / file.name)
        partial.rmdir()
    else:
        partial.rename(folder)


def load_adapters(model: nn.Module, folder: str) -> Any:
    """The model with the adapters of a folder.

    Raises:
        ConfigError: if it holds none, or those of another model.
    """
    peft = _peft()
    if not (Path(folder) / "adapter_config.json").is_file():
        raise ConfigError(f"{folder} holds no adapter: no adapter_config.json; `offload finetune --output DIR` writes one")
    try:
        return peft.PeftModel.from_pretrained(model, folder).eval()
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"the adapter {folder} does not fit the model: {str(error).splitlines()[0]}") from error


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError('adapters need the package peft: pip install "offload[lora]"') from error
    return peft
