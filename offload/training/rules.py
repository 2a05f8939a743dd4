"""What an optimizer does to its tensors: torch's own fused kernels, given pieces."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from offload.training.options import SGD, Training


class Rule(Protocol):
    """One step of an optimizer.

    Attributes:
        moments: the names of its states.
        defaults: of its settings, as a torch optimizer's `param_groups` hold them.
    """

    moments: tuple[str, ...]
    defaults: dict[str, Any]

    def step(
        self,
        targets: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        moments: Mapping[str, Sequence[torch.Tensor]],
        count: int,
        settings: Mapping[str, Any],
    ) -> None:
        """Change `targets` and `moments` in place.

        Args:
            count: steps of these tensors, this one included.
        """


class AdamW:
    """arXiv 1711.05101, by torch's fused kernel."""

    moments = ("exp_avg", "exp_avg_sq")

    def __init__(self, training: Training) -> None:
        names = ("betas", "eps", "weight_decay")
        self.defaults = {"lr": training.learning_rate} | {name: getattr(training, name) for name in names}

    def step(
        self,
        targets: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        moments: Mapping[str, Sequence[torch.Tensor]],
        count: int,
        settings: Mapping[str, Any],
    ) -> None:
        adamw(
            list(targets),
            list(gradients),
            list(moments["exp_avg"]),
            list(moments["exp_avg_sq"]),
            [],
            # The kernel counts the step itself.
            [torch.tensor(float(count - 1), device=target.device) for target in targets],
            fused=True,
            amsgrad=False,
            beta1=settings["betas"][0],
            beta2=settings["betas"][1],
            lr=settings["lr"],
            weight_decay=settings["weight_decay"],
            eps=settings["eps"],
            maximize=False,
        )


class Sgd:
    """With or without momentum, by torch's fused kernel."""

    def __init__(self, training: Training) -> None:
        self.defaults = {name: getattr(training, name) for name in ("momentum", "weight_decay")}
        self.defaults["lr"] = training.learning_rate
        self.moments = ("momentum_buffer",) if training.momentum else ()

    def step(
        self,
        targets: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        moments: Mapping[str, Sequence[torch.Tensor]],
        count: int,
        settings: Mapping[str, Any],
    ) -> None:
        buffers: list[torch.Tensor | None] = [None] * len(targets)
        if self.moments:
            buffers = list(moments["momentum_buffer"])
            if count == 1:
                # The first gradient is the momentum, undamped.
                for buffer, target, gradient in zip(moments["momentum_buffer"], targets, gradients, strict=True):
                    torch.add(gradient, target, alpha=settings["weight_decay"], out=buffer)
                    target.add_(buffer, alpha=-settings["lr"])
                return
        sgd(
            list(targets),
            list(gradients),
            buffers,
            fused=True,
            weight_decay=settings["weight_decay"],
            momentum=settings["momentum"],
            lr=settings["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


def rule_of(training: Training) -> Rule:
    return Sgd(training) if training.optimizer == SGD else AdamW(training)
