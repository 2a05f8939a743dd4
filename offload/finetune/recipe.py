"""How a fine-tuning goes."""

import math
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from offload.adapters.peft import with_adapters
from offload.choices import TrainingMethod
from offload.finetune.data import Batches
from offload.storage.errors import ConfigError

METHODS: tuple[str, ...] = get_args(TrainingMethod)
LORA, FULL = METHODS


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train.

    Attributes:
        method: `lora` trains adapters, `full` all weights.
        rank, alpha, dropout, target_modules: of the adapters, as peft takes them.
        learning_rate: after the warmup.
        warmup: steps in which the learning rate rises to that; it stays there.
        gradient_accumulation: batches whose gradients one step adds up.
        layer_major: a block is brought once for all of a step's batches; else once for each.
        max_steps: 0 for as many as the epochs have.
        save_every: steps from one checkpoint to the next; 0 for none.
        evaluate_every: steps from one evaluation to the next; 0 for one at the end.
    """

    method: str = LORA
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str = "all-linear"
    learning_rate: float = 2e-4
    epochs: int = 1
    max_steps: int = 0
    gradient_accumulation: int = 1
    layer_major: bool = True
    max_grad_norm: float = 1.0
    warmup: int = 0
    seed: int = 0
    save_every: int = 0
    evaluate_every: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method={self.method!r} is not known; give one of {', '.join(METHODS)}")
        for name in ("rank", "epochs", "gradient_accumulation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("alpha", "learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must be a positive number")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} must be at least 0 and below 1")
        if min(self.max_steps, self.warmup, self.seed, self.save_every, self.evaluate_every) < 0:
            raise ConfigError("max_steps, warmup, seed, save_every and evaluate_every must be at least 0")

    def adapted(self, model: nn.Module) -> Any:
        """Return the model with new adapters, where these are trained; else the model itself."""
        if self.method != LORA:
            return model
        return with_adapters(model, self.rank, self.alpha, self.dropout, self.target_modules, self.seed)

    def steps(self, batches: Batches) -> int:
        """Count the optimizer's steps, all epochs together."""
        whole = self.epochs * -(-len(batches) // self.gradient_accumulation)
        return min(whole, self.max_steps) if self.max_steps else whole

    def rate(self, step: int) -> float:
        """The learning rate of a step; the first one is 1."""
        return self.learning_rate * min(1.0, step / max(1, self.warmup))
