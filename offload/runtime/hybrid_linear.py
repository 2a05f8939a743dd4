"""A product of which the device computes some rows and the CPU the others, from where they live (HeteGen, arXiv 2403.01164)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from offload.model.homes import ParameterHome
from offload.scheduler.model_spec import DivisibleWeight

Forward = Callable[..., Any]

_CPU = torch.device("cpu")


class HybridLinear:
    """One linear module of a divided layer.

    Args:
        module: its weight is the device's rows while the layer is onloaded.
        weight, bias: their homes in CPU memory, whole; no bias, no home.
    """

    def __init__(self, module: nn.Linear, weight: ParameterHome, bias: ParameterHome | None) -> None:
        self.module = module
        self._weight, self._bias = weight, bias

    def wrap(self, forward: Forward) -> Forward:
        def shared(rows: torch.Tensor) -> torch.Tensor:
            weight, bias = self.module.weight, self.module.bias
            if len(weight) == len(self._weight.tensor):
                # Called outside of its layer: the weight is at home.
                result: torch.Tensor = forward(rows)
                return result
            # Fetched first: a device that computes behind the host's back does its part while the CPU does the other.
            fetched = rows.to(_CPU)
            here = nn.functional.linear(rows, weight, None if bias is None else bias[: len(weight)])
            there = nn.functional.linear(fetched, self._weight.host_part, self._host_bias(len(weight)))
            return torch.cat((here, there.to(here.device)), dim=-1)

        return shared

    def _host_bias(self, first_row: int) -> torch.Tensor | None:
        bias: torch.Tensor | None = self.module.bias
        if bias is None:
            return None
        return (self._bias.tensor if self._bias is not None else bias.to(_CPU))[first_row:]


def split_rows(
    modules: Iterable[tuple[str, nn.Linear]], homes: Mapping[str, ParameterHome], cpu_percent: int
) -> list[HybridLinear]:
    """Divide products between the device and the CPU.

    Args:
        modules: with the names of their weights.
        cpu_percent: of the rows, those that the CPU computes with.
    """
    products = []
    for name, module in modules:
        home = homes[name]
        weight = DivisibleWeight(len(home.tensor), home.tensor[0].nbytes, home.tensor.element_size())
        home.device_rows = len(home.tensor) - weight.host_rows(cpu_percent)
        products.append(HybridLinear(module, home, homes.get(f"{name.removesuffix('weight')}bias")))
    return products
