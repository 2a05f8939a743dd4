"""What a layer returns of its own weights outlives its slot."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from offload import BudgetTooSmall, offload
from tests.poison import poison_homes

LAYERS, WIDTH = 8, 64


class _Telling(nn.Module):
    """Returns a weight beside what it computes, and a part of one in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        return torch.tanh(self.product(hidden)), self.product.weight, [self.product.bias[1:]]


class _Told(PreTrainedModel):
    config_class = PreTrainedConfig
    main_input_name = "hidden"

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        self.layers = nn.ModuleList(_Telling() for _ in range(LAYERS))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights, biases = [], []
        for layer in self.layers:
            hidden, weight, (bias,) = layer(hidden)
            weights.append(weight)
            biases.append(bias)
        return hidden, torch.stack(weights), torch.stack(biases)


def test_returned_weights_are_copies():
    model, hidden = _Told().eval(), torch.randn(3, WIDTH)
    with torch.no_grad():
        wanted = model(hidden)
    with pytest.raises(BudgetTooSmall) as refused, offload(model, device="cpu", cpu_memory=1):
        pass
    with offload(model, device="cpu", cpu_memory=refused.value.least_bytes) as session, torch.no_grad():
        assert len(session.plan.weights.streamed) == LAYERS > session.plan.weights.slot_count
        poison_homes(session)
        found = session.model(hidden)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
