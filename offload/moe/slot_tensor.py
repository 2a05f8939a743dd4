"""Weights of experts that lie in slots, or are on their way, as the model's own code sees them: one tensor with all experts.

The code that computes experts (transformers' `grouped_mm`, `batched_mm`, or the model's own loop) runs as it is, once, on all
rows. Only where it takes an expert out of the tensor, or multiplies by groups, does each expert's weight come from
where it is. So sorting, gating, biases, norms and the one sum over a token's choices are the plain model's, on the same shapes.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import nn

_WIDEST_SPAN = 512
"""Slots that one grouped product on a device goes over: its kernels take so many groups, and no product for empty ones."""


class ExpertWeights(Protocol):
    """The experts that one call of a module needs.

    Attributes:
        asynchronous: the device waits for copies by itself, and wants few large products.
        rows: how many tokens chose each of them.
    """

    asynchronous: bool
    rows: Mapping[int, int]

    def in_order_of_arrival(self, name: str, experts: Sequence[int]) -> Sequence[int]:
        """The same experts, those first that are computed elsewhere or there."""

    def weight(self, name: str, expert: int) -> torch.Tensor:
        """One expert's part of a parameter, on the device; valid until the next call."""

    def elsewhere(self, expert: int) -> bool:
        """True if another device computes this one: `weight` is there, then."""

    def slots(self, name: str, experts: Sequence[int]) -> tuple[torch.Tensor, dict[int, int]]:
        """The parameter with slots in place of experts, and the slots of those of them that have one."""


class SlotTensor(torch.Tensor):
    """A parameter [experts, ...] without values of its own."""

    _weights: ExpertWeights
    _name: str
    _flipped: bool

    @staticmethod
    def of(
        weights: ExpertWeights,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        flipped: bool = False,
    ) -> "SlotTensor":
        """Args: flipped: the last two dimensions are exchanged; `shape` is what comes of it."""
        made: SlotTensor = torch.Tensor._make_wrapper_subclass(SlotTensor, shape, dtype=dtype, device=device)
        made._weights, made._name, made._flipped = weights, name, flipped
        return made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = next((value for value in (*args, *kwargs.values()) if isinstance(value, SlotTensor)), None)
        name = getattr(function, "__name__", "")
        if weight is not None and name in _HANDLERS:
            return _HANDLERS[name](function, weight, *args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        name = getattr(function, "__name__", str(function))
        if name.split(".")[0] in ("grouped_mm_fallback", "_grouped_mm"):
            return _grouped(function, args[1], *args, **(kwargs or {}))
        raise NotImplementedError(
            f"the model's code does {name} with all experts at once, and they are brought one by one; give "
            "expert_policy='layers' (--expert-policy layers) to stream whole layers"
        )

    def __deepcopy__(self, memo: Any) -> Any:
        raise NotImplementedError("weights in slots are not copied")


def _transposed(function: Any, weight: SlotTensor, *args: Any, **kwargs: Any) -> SlotTensor:
    dims = {dim % 3 for dim in args[1:]} | {dim % 3 for dim in kwargs.values()}
    if dims != {1, 2}:
        raise NotImplementedError("experts are exchanged with another dimension, and they are brought one by one")
    shape = (weight.shape[0], weight.shape[2], weight.shape[1])
    return SlotTensor.of(weight._weights, weight._name, shape, weight.dtype, weight.device, not weight._flipped)


def _one(weight: SlotTensor, expert: int) -> torch.Tensor:
    found = weight._weights.weight(weight._name, expert)
    return found.transpose(-2, -1) if weight._flipped else found


def _taken(function: Any, weight: SlotTensor, _: Any, index: Any) -> torch.Tensor:
    """`weight[index]`: one expert, or one for each row."""
    if isinstance(index, (slice, tuple)):
        raise NotImplementedError("the model's code takes several experts at once, and they are brought one by one")
    if not isinstance(index, torch.Tensor) or (index.numel() == 1 and index.dim() == 0):
        return _one(weight, int(index))
    experts = index.tolist()
    pool, slots = weight._weights.slots(weight._name, experts)
    if all(expert in slots for expert in experts):
        places = torch.tensor([slots[expert] for expert in experts])
        picked = pool[places.to(weight.device, non_blocking=True)]
        return picked.transpose(-2, -1) if weight._flipped else picked
    rows = torch.empty((len(experts), *weight.shape[1:]), dtype=weight.dtype, device=weight.device)
    for expert in dict.fromkeys(experts):
        rows[[place for place, chosen in enumerate(experts) if chosen == expert]] = _one(weight, expert)
    return rows


def _grouped(function: Any, weight: SlotTensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Rows, sorted by expert, times each its expert's weight: `function` itself, on the weights where they are."""
    rows = args[0]
    offsets = kwargs["offs"] if "offs" in kwargs else args[2]
    ends = _ends(weight._weights.rows, offsets, rows.shape[0])
    begins = [0, *ends[:-1]]
    present = [expert for expert, (begin, end) in enumerate(zip(begins, ends, strict=True)) if end > begin]
    source = weight._weights
    products: dict[int, torch.Tensor] = {}
    # Fetched first: a device that computes behind the host's back does its part while the CPU does the other.
    fetched = {item: rows[begins[item] : ends[item]].to("cpu") for item in present if source.elsewhere(item)}
    if source.asynchronous:
        products = _together(function, weight, rows, begins, ends, [item for item in present if not source.elsewhere(item)])
    for expert in source.in_order_of_arrival(weight._name, [item for item in present if item not in products]):
        part = fetched[expert] if expert in fetched else rows[begins[expert] : ends[expert]]
        one = _one(weight, expert).unsqueeze(0)
        count = torch.full((1,), len(part), dtype=offsets.dtype, device=one.device)
        products[expert] = _call(function, part, one, count, "offs" in kwargs).to(rows.device)
    left = rows.shape[0] - (ends[-1] if ends else 0)
    rest = [rows.new_empty((left, weight.shape[-1]))] if left else []
    return torch.cat([*(products[expert] for expert in present), *rest])


def _ends(rows: Mapping[int, int], offsets: torch.Tensor, count: int) -> list[int]:
    """Where each expert's rows end: as the choices say, which are known, so that the device is not waited for."""
    if sum(rows.values()) != count:
        # Some rows belong to no expert.
        return offsets.tolist()
    return list(accumulate(rows.get(expert, 0) for expert in range(len(offsets))))


def _call(function: Any, rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, named: bool) -> torch.Tensor:
    result: torch.Tensor = function(rows, weight, offs=ends) if named else function(rows, weight, ends)
    return result


def _together(
    function: Any, weight: SlotTensor, rows: torch.Tensor, begins: list[int], ends: list[int], experts: Sequence[int]
) -> dict[int, torch.Tensor]:
    """The products of all experts in slots, in as few calls as there are runs of neighbouring slots."""
    pool, slots = weight._weights.slots(weight._name, experts)
    tensor = pool.transpose(-2, -1) if weight._flipped else pool
    products: dict[int, torch.Tensor] = {}
    for run in _runs(sorted((slot, expert) for expert, slot in slots.items())):
        first, last = run[0][0], run[-1][0]
        sizes = {slot: ends[expert] - begins[expert] for slot, expert in run}
        sums = torch.tensor(list(accumulate(sizes.get(slot, 0) for slot in range(first, last + 1))), dtype=torch.int32)
        selected = torch.cat([rows[begins[expert] : ends[expert]] for _, expert in run])
        result = _call(function, selected, tensor[first : last + 1], sums.to(rows.device, non_blocking=True), True)
        for (_, expert), part in zip(run, result.split([sizes[slot] for slot, _ in run]), strict=True):
            products[expert] = part
    return products


def _runs(placed: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    found: list[list[tuple[int, int]]] = []
    for item in placed:
        if not found or item[0] - found[-1][0][0] >= _WIDEST_SPAN:
            found.append([])
        found[-1].append(item)
    return found


def _aligned(function: Any, weight: SlotTensor, *args: Any) -> int:
    """`data_ptr`: slots are aligned for every kernel."""
    return 0


_HANDLERS: dict[str, Callable[..., Any]] = {
    "transpose": _transposed,
    "__getitem__": _taken,
    "grouped_mm": _grouped,
    "_grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped,
    "data_ptr": _aligned,
}


class SlottedModule:
    """A module of experts as its own code sees it, with slotted weights for parameters.

    Args:
        by_groups: compute by grouped products, whatever the model is set to: some groups are computed elsewhere.
    """

    def __init__(self, module: nn.Module, parameters: dict[str, SlotTensor], by_groups: bool) -> None:
        self._module = module
        self._seen: dict[str, Any] = {**parameters}
        if by_groups:
            self._seen["config"] = _ByGroups

    def __getattr__(self, name: str) -> Any:
        return self._seen[name] if name in self._seen else getattr(self._module, name)


class _ByGroups:
    """A config, as far as the decorator of experts classes looks at it."""

    _experts_implementation = "grouped_mm"
