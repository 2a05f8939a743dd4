"""What a user may ask of training."""

import math
from dataclasses import dataclass
from typing import get_args

import torch

from offload.choices import ActivationTier, MasterDtype, Optimizer, StateTier
from offload.storage.errors import ConfigError

OPTIMIZERS: tuple[str, ...] = get_args(Optimizer)
ADAMW, ADAMW8BIT, SGD = OPTIMIZERS

ACTIVATION_TIERS: tuple[str, ...] = get_args(ActivationTier)
RECOMPUTE, GPU, CPU, NVME = ACTIVATION_TIERS
STATE_TIERS: tuple[str, ...] = get_args(StateTier)

MASTER_DTYPES: tuple[str, ...] = get_args(MasterDtype)

_SUB_GROUP_ELEMENTS = 2 << 20


@dataclass(frozen=True, slots=True)
class Training:
    """How a session trains: `offload(model, training=Training(...))`.

    Attributes:
        full: all weights are trained, so that room for their gradients and optimizer state is set aside at once.
        optimizer: `adamw` (torch's fused kernel), `adamw8bit` (its moments in 8 bits, so not the same steps) or `sgd`.
        learning_rate, betas, eps, weight_decay, momentum: of the optimizer.
        master_dtype: `float32` steps a copy of every weight of 16 bits, and adds gradients up in it; `none` steps the weights.
        state_tier: where optimizer state lives: `cpu` or `nvme`. With `nvme`, streamed weights live there too.
        activation_tier: where what backward needs of a layer waits. `recompute`: its inputs stay on the device, the rest
            is computed again. `cpu`, `nvme`: the inputs wait there. `gpu`: all of it stays, and nothing is computed again.
        loss_chunk: tokens whose logits are there at once; 0 for all. Of level *rounding*: sums are in another order.
        state_dir: where state files are written; by default the session's disk folder.
        micro_batches: micro-batches whose layer inputs are alive at once (`session.backward`); sizes the reserved memory.
        sub_group_elements: of the parameters that are updated at once.

    Example:
        ::

            training = Training(full=True, optimizer="adamw8bit", learning_rate=1e-5, state_tier="nvme")
            with offload("org/model", gpu_memory="8GiB", training=training) as session:
                session.backward([lambda: session.model(**batch).loss])
                session.step(max_grad_norm=1.0)
    """

    full: bool = False
    optimizer: str = ADAMW
    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    master_dtype: str = "float32"
    state_tier: str = CPU
    activation_tier: str = RECOMPUTE
    loss_chunk: int = 0
    state_dir: str | None = None
    sub_group_elements: int = _SUB_GROUP_ELEMENTS
    micro_batches: int = 1

    def __post_init__(self) -> None:
        for name, known in (
            ("optimizer", OPTIMIZERS),
            ("master_dtype", MASTER_DTYPES),
            ("state_tier", STATE_TIERS),
            ("activation_tier", ACTIVATION_TIERS),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not known; give one of {', '.join(known)}")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate={self.learning_rate} must be a positive number")
        if not all(0 <= beta < 1 for beta in (*self.betas, self.momentum)):
            raise ConfigError(f"betas={self.betas} and momentum={self.momentum} must be at least 0 and below 1")
        if not 0 < self.eps < math.inf or not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"eps={self.eps} must be positive, and weight_decay={self.weight_decay} at least 0")
        if self.loss_chunk < 0:
            raise ConfigError(f"loss_chunk={self.loss_chunk} must be at least 0")
        if self.sub_group_elements < 1 or self.micro_batches < 1:
            raise ConfigError(
                f"sub_group_elements={self.sub_group_elements} and micro_batches={self.micro_batches} must be at least 1"
            )

    @property
    def masters(self) -> torch.dtype | None:
        """The dtype of the masters, None without."""
        return None if self.master_dtype == "none" else getattr(torch, self.master_dtype)
