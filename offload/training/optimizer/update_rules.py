"""What an optimizer does to its tensors: torch's own fused kernels, given pieces."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from offload.scheduler.sub_groups import Moment
from offload.storage.codecs.base import Codec
from offload.storage.codecs.power_blocks import BLOCK, PowerBlocks
from offload.training.options import ADAMW8BIT, SGD, Training

_MEANS, _SQUARES = PowerBlocks(torch.int8, 2), PowerBlocks(torch.uint8, 4)
"""The moments of AdamW in 8 bits."""


class UpdateRule(Protocol):
    """One step of an optimizer.

    Attributes:
        moments: its states.
        defaults: of its settings, as a torch optimizer's `param_groups` hold them.
    """

    @property
    def moments(self) -> tuple[Moment, ...]: ...

    @property
    def defaults(self) -> dict[str, Any]: ...

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
            # The kernel counts the step itself. Made on the device: a copy of a number would be waited for.
            [torch.full((), float(count - 1), device=target.device) for target in targets],
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
    """AdamW whose moments are kept in 8 bits (after arXiv 2110.02861).

    Blocks of 256 share a scale, and levels lie closer together near zero. Torch's kernel steps what they stand for.
    """

    moments = (
        Moment("exp_avg", "int8"),
        Moment("exp_avg_scale", "float32", BLOCK),
        Moment("exp_avg_sq", "uint8"),
        Moment("exp_avg_sq_scale", "float32", BLOCK),
    )

    def step(
        self,
        targets: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        moments: Mapping[str, Sequence[torch.Tensor]],
        count: int,
        settings: Mapping[str, Any],
    ) -> None:
        means = _decoded(_MEANS, moments["exp_avg"], moments["exp_avg_scale"])
        squares = _decoded(_SQUARES, moments["exp_avg_sq"], moments["exp_avg_sq_scale"])
        floats = [gradient.float() for gradient in gradients]
        wide = [target.float() for target in targets]
        super().step(wide, floats, {"exp_avg": means, "exp_avg_sq": squares}, count, settings)
        for index, target in enumerate(targets):
            if wide[index] is not target:
                target.copy_(wide[index])
            _MEANS.encode(means[index], (moments["exp_avg"][index], moments["exp_avg_scale"][index]))
            _SQUARES.encode(squares[index], (moments["exp_avg_sq"][index], moments["exp_avg_sq_scale"][index]))


def _decoded(codec: Codec, levels: Sequence[torch.Tensor], scales: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [codec.decode(parts, len(parts[0])).view(-1) for parts in zip(levels, scales, strict=True)]


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
