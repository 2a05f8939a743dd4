"""Parameters beside the model that a loss depends on: a value head, prompts of a wrapper."""

from collections.abc import Collection

import torch
from torch import nn

STEP_THEM = (
    "make them a part of the model (model.head = head) before session.optimizer is first asked for, or step them by an "
    "optimizer of your own"
)


def parameters_beside(loss: torch.Tensor, known: Collection[int]) -> list[nn.Parameter]:
    """Find the parameters in a loss's graph that are not known.

    Args:
        known: ids of those that are.
    """
    found: dict[int, nn.Parameter] = {}
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, nn.Parameter) and id(variable) not in known:
            found[id(variable)] = variable
        waiting += [following for following, _ in node.next_functions]
    return list(found.values())
