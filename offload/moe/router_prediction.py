"""Which experts the next layer will ask for, asked of its own router, a layer early.

The router of the next layer is run on what this layer's router was given (Mixtral-offloading, arXiv 2312.17238, section 3.2).
What it answers is only brought in advance, so that outputs do not depend on it. Other predictors (a gate trained for the next
layer, 2308.12066; a network that sees the prompt, 2310.18859 and 2410.17954) are other `Predictor`s.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from offload.runtime.module_wrappers import Forward, ForwardWrap

_NAMES = ("gate", "router")
"""What routers are called, beside or above the experts that they choose from."""

_MOST_TOKENS = 8
"""In a pass: with more of them, most experts are asked for anyway."""


@dataclass(frozen=True, slots=True)
class RouterPrediction:
    """What one layer is expected to ask for.

    Attributes:
        experts: the likeliest first, as many as a token asks for, of each token.
        twice: twice as many.
    """

    layer: int
    experts: tuple[int, ...]
    at_2k: tuple[int, ...]


class RouterPredictor(Protocol):
    """Guesses what a layer will ask for."""

    def after(self, layer: int) -> RouterPrediction | None:
        """The layer has been routed: what will the next one ask for? None if there is nothing to say."""


@dataclass(slots=True)
class Accuracy:
    """How good predictions were, once it is known what was asked for.

    Attributes:
        asked: experts asked for, where there was a prediction.
        found, found_twice: of them, those among as many predicted ones, and among twice as many.
    """

    asked: int = 0
    found: int = 0
    found_at_2k: int = 0

    def add(self, prediction: RouterPrediction, needed: Sequence[int]) -> None:
        self.asked += len(needed)
        self.found += len(set(needed) & set(prediction.experts))
        self.found_at_2k += len(set(needed) & set(prediction.at_2k))


class NextRouter:
    """The predictor that needs no training.

    Args:
        routers: of each layer; None where there is none that could be asked.
        told: where nothing can be predicted.
    """

    def __init__(self, routers: Sequence[nn.Module | None], warn: Callable[[str], None]) -> None:
        self._routers = list(routers)
        self._warn = warn
        if None in self._routers:
            warn(f"{self._routers.count(None)} layers have no router beside their experts that could be asked early")
        self._seen: list[tuple[Any, Any] | None] = [None] * len(routers)
        self._forwards: list[Forward | None] = [None] * len(routers)

    def install(self, stack: ExitStack) -> None:
        """Listen to what the routers are given."""
        for layer, router in enumerate(self._routers):
            if router is not None:
                stack.callback(ForwardWrap(router, self._listening(layer)).undo)

    def after(self, layer: int) -> RouterPrediction | None:
        seen = self._seen[layer]
        following = layer + 1
        forward = self._forwards[following] if following < len(self._forwards) else None
        if seen is None or forward is None:
            return None
        given, answer = seen
        self._seen[layer] = None
        chosen = _choices(answer)
        if chosen is None or chosen.shape[0] > _MOST_TOKENS:
            return None
        try:
            with torch.no_grad():
                ahead = forward(given)
        except Exception as error:  # a router that takes more than hidden states
            self._forwards[following] = None
            self._warn(f"the router of the layer with experts number {following} cannot be asked early: {error}")
            return None
        return _prediction(following, ahead, chosen.shape[-1])

    def _listening(self, layer: int) -> Callable[[Forward], Forward]:
        def make(forward: Forward) -> Forward:
            self._forwards[layer] = forward

            def listened(*args: Any, **kwargs: Any) -> Any:
                answer = forward(*args, **kwargs)
                self._seen[layer] = (args[0].detach(), answer) if len(args) == 1 and not kwargs else None
                return answer

            return listened

        return make


def find_router(model: nn.Module, experts_key: str) -> nn.Module | None:
    """The router beside the experts, or beside the module that holds them."""
    path = experts_key
    for _ in range(2):
        path = path.rpartition(".")[0]
        holder = model.get_submodule(path) if path else model
        for name, child in holder.named_children():
            if name in _NAMES and next(child.parameters(), None) is not None:
                return child
    return None


def _choices(answer: Any) -> torch.Tensor | None:
    """The experts in a router's answer that it chose, [tokens, k]."""
    if not isinstance(answer, tuple):
        return None
    return next(
        (
            item
            for item in answer
            if isinstance(item, torch.Tensor) and item.dim() == 2 and item.dtype in (torch.int64, torch.int32)
        ),
        None,
    )


def _prediction(layer: int, answer: Any, chosen: int) -> RouterPrediction | None:
    choices = _choices(answer)
    if choices is None:
        return None
    scores = next((item for item in answer if torch.is_floating_point(item) and item.shape[-1] >= 2 * chosen), None)
    twice = choices if scores is None else scores.reshape(-1, scores.shape[-1]).topk(2 * chosen, dim=-1).indices
    return RouterPrediction(
        layer, tuple(dict.fromkeys(choices.reshape(-1).tolist())), tuple(dict.fromkeys(twice.reshape(-1).tolist()))
    )
