"""Products of few sizes: a mixture's experts have another number of rows each, and a CPU's kernels keep memory for each size.

In 16 bits, on the CPU, oneDNN computes a row alike whatever the number of rows, so that rows of zeros change nothing. That is
not taken on trust: it is looked at for each shape of weights before they are used.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_DTYPES = (torch.bfloat16, torch.float16)
_EXACT_ROWS = 4
"""No more rows than that are padded: a decode step's."""

_STEPS = 2
"""Sizes between a power of two and the next."""

_LOOKED_AT = (5, 11, 23, 77)
_GROUPED = ("grouped_mm", "_grouped_mm")
_PRODUCTS = ("linear", "mm", "matmul", "__matmul__")


def padded_rows(rows: int) -> int:
    """The number of rows that a product of `rows` is computed with: half as many more at most."""
    if rows <= _EXACT_ROWS:
        return rows
    step = max(1, (1 << (rows - 1).bit_length() - 1) // _STEPS)
    return -(-rows // step) * step


class PaddedProducts(TorchFunctionMode):
    """While it is entered, products of a matrix of 16 bits with a weight that is not trained have few numbers of rows."""

    def __init__(self) -> None:
        super().__init__()
        self._alike: dict[Any, bool] = {}
        """Whether padded products of such a weight are the same bits."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: value for key, value in (kwargs or {}).items() if value is not None}
        name = getattr(function, "__name__", "")
        if len(args) < 2 or name not in (*_GROUPED, *_PRODUCTS):
            return function(*args, **kwargs)
        rows, weight = args[:2]
        if name in _GROUPED and type(weight) not in (torch.Tensor, torch.nn.Parameter):
            # A tensor that takes groups apart itself, by products that come here again.
            with self:
                return type(weight).__torch_function__(function, types, args, kwargs)
        # A bias or another dtype, by name, is left to the function itself.
        if kwargs.keys() - {"offs", "out"} or not _concerns(rows, weight, 3 if name in _GROUPED else 2):
            return function(*args, **kwargs)
        if name in _GROUPED:
            ends = kwargs["offs"] if "offs" in kwargs else args[2] if len(args) == 3 else None
            return function(*args, **kwargs) if ends is None else self._grouped(rows, weight, ends.tolist())
        return self._product(lambda given: function(given, weight, *args[2:]), rows, (name, weight), kwargs.get("out"))

    def _grouped(self, rows: torch.Tensor, weight: torch.Tensor, ends: list[int]) -> torch.Tensor:
        groups = [(weight[index], begin, end) for index, (begin, end) in enumerate(pairwise([0, *ends])) if end > begin]
        if torch.is_grad_enabled() and rows.requires_grad:
            rest = rows.new_zeros((len(rows) - ends[-1], weight.shape[-1]))
            return torch.cat([*(self._one(one, rows[begin:end]) for one, begin, end in groups), rest])
        result = rows.new_zeros((len(rows), weight.shape[-1]))
        for one, begin, end in groups:
            result[begin:end] = self._one(one, rows[begin:end])
        return result

    def _one(self, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self._product(partial(_times, weight), rows, ("mm", weight))

    def _product(
        self,
        multiply: Callable[[torch.Tensor], torch.Tensor],
        rows: torch.Tensor,
        by: tuple[str, torch.Tensor],
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        name, weight = by
        key = name, weight.dtype, weight.shape, weight.stride()
        if key not in self._alike:
            self._alike[key] = _are_alike(multiply, rows.shape[1], weight.dtype)
        more = padded_rows(len(rows)) - len(rows) if self._alike[key] else 0
        result = multiply(functional.pad(rows, (0, 0, 0, more)))[: len(rows)] if more else multiply(rows)
        return result if out is None else out.copy_(result)


def _times(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return rows @ weight


def _concerns(rows: Any, weight: Any, dims: int) -> bool:
    return (
        isinstance(rows, torch.Tensor)
        and isinstance(weight, torch.Tensor)
        and (rows.dim(), weight.dim()) == (2, dims)
        and rows.device.type == "cpu"
        and rows.dtype is weight.dtype
        and rows.dtype in _DTYPES
        and not (weight.requires_grad and torch.is_grad_enabled())
    )


@torch.no_grad()
def _are_alike(multiply: Callable[[torch.Tensor], torch.Tensor], width: int, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    for count in _LOOKED_AT:
        rows = torch.randn(count, width, generator=generator).to(dtype)
        padded = functional.pad(rows, (0, 0, 0, padded_rows(count) - count))
        if not torch.equal(multiply(rows), multiply(padded)[:count]):
            return False
    return True
