"""What an optimizer does to its tensors: torch's own fused kernels, given pieces."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from offload.scheduler.sub_groups import Moment
from offload.training.options import ADAMW8BIT, SGD, Training

_SHARED = 256
"""Elements of a moment in 8 bits that share a scale."""


class UpdateRule(Protocol):
    """One step of an optimizer.

    Attributes:
        moments: its states.
        defaults: of its settings, as a torch optimizer's `param_groups` hold them.
    """

    moments: tuple[Moment, ...]
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

    moments: tuple[Moment, ...] = (Moment("exp_avg"), Moment("exp_avg_sq"))

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


class AdamW8bit(AdamW):
    """AdamW whose moments are kept in 8 bits (after arXiv 2110.02861): blocks of 256 share a scale, and levels lie closer
    together near zero. Torch's kernel steps what they stand for."""

    moments = (
        Moment("exp_avg", "int8"),
        Moment("exp_avg_scale", "float32", _SHARED),
        Moment("exp_avg_sq", "uint8"),
        Moment("exp_avg_sq_scale", "float32", _SHARED),
    )

    def step(
        self,
        targets: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        moments: Mapping[str, Sequence[torch.Tensor]],
        count: int,
        settings: Mapping[str, Any],
    ) -> None:
        means = [
            _coarse(levels, scale, 127, 2) for levels, scale in zip(moments["exp_avg"], moments["exp_avg_scale"], strict=True)
        ]
        squares = [
            _coarse(levels, scale, 255, 4)
            for levels, scale in zip(moments["exp_avg_sq"], moments["exp_avg_sq_scale"], strict=True)
        ]
        floats = [gradient.float() for gradient in gradients]
        wide = [target.float() for target in targets]
        super().step(wide, floats, {"exp_avg": means, "exp_avg_sq": squares}, count, settings)
        for index, target in enumerate(targets):
            if wide[index] is not target:
                target.copy_(wide[index])
            _keep(means[index], moments["exp_avg"][index], moments["exp_avg_scale"][index], 127, 2)
            _keep(squares[index], moments["exp_avg_sq"][index], moments["exp_avg_sq_scale"][index], 255, 4)


def _blocks_of(values: torch.Tensor) -> torch.Tensor:
    """[blocks, 256], filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -len(values) % _SHARED)).view(-1, _SHARED)


def _coarse(levels: torch.Tensor, scale: torch.Tensor, most: int, power: int) -> torch.Tensor:
    """What the levels stand for: `scale * (level / most) ** power`, with the level's sign."""
    share = _blocks_of(levels.float()).div_(most)
    return (share.sign() * share.abs().pow_(power) * scale[:, None]).view(-1)[: len(levels)].contiguous()


def _keep(values: torch.Tensor, levels: torch.Tensor, scale: torch.Tensor, most: int, power: int) -> None:
    """The nearest levels; nothing but zero becomes zero, since second moments are divided by."""
    blocks = _blocks_of(values)
    scale.copy_(blocks.abs().amax(1))
    share = blocks.div(scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None])
    found = share.abs().pow_(1 / power).mul_(most).round_().clamp_(1, most).mul_(share.sign())
    levels.copy_(found.view(-1)[: len(levels)])


class Sgd:
    """Stochastic gradient descent with or without momentum, by torch's fused kernel."""

    def __init__(self, training: Training) -> None:
        self.defaults = {name: getattr(training, name) for name in ("momentum", "weight_decay")}
        self.defaults["lr"] = training.learning_rate
        self.moments = (Moment("momentum_buffer"),) if training.momentum else ()

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


def rule_of(training: Training) -> UpdateRule:
    kinds: dict[str, type[AdamW] | type[AdamW8bit] | type[Sgd]] = {SGD: Sgd, ADAMW8BIT: AdamW8bit}
    return kinds.get(training.optimizer, AdamW)(training)
