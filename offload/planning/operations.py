"""What the operations of a pass without values come to: products, traffic, memory that is held, what of a cache is read."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from offload.model.pytree import leaves
from offload.scheduler.work import Work

# fmt: off
_VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "split", "alias",
    "detach", "unbind", "_reshape_alias", "as_strided", "split_with_sizes", "chunk", "lift_fresh",
}
# fmt: on

_WRITES = {"copy_", "zero_", "fill_"}
"""These do not look at what they write to."""

_MOST_OPERATIONS = 40_000
"""A model of 200 layers has less; one that loops over its tokens would take minutes."""


class DryRunFailed(Exception):
    """The model's code needs values (a branch on them, say) or inputs that are not known here."""


class Counter(TorchDispatchMode):
    """Sums up operations, and the memory that their results hold."""

    def __init__(self, model: nn.Module, always_there: Iterable[nn.Parameter] = (), guesses: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outside = Work()
        self.unread: set[int] = set()
        """Storages of the cache that the pass was given and has not read so far."""
        self.peak_bytes = 0
        self.begun_bytes = 0
        self._live_bytes = 0
        self._weights = {value.untyped_storage()._cdata for value in model.parameters()}
        self._names = {value.untyped_storage()._cdata: name for name, value in model.named_parameters()}
        self._always_there = {value.untyped_storage()._cdata for value in always_there}
        self._guesses = guesses
        """Values that the code asks for are made up: enough to see which weights it uses, not what that costs."""
        self._there = self._always_there
        """Weights of the unit that is called, and those that always are."""
        self.stray_reads: set[str] = set()
        """Names of the others that were used."""
        self._constant = {value.untyped_storage()._cdata for value in model.buffers()} | self._weights
        self._held: set[int] = set()
        self._open: list[_Sums] = []
        self._sums = _Sums()
        self._seen = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._guesses and function is torch.ops.aten._local_scalar_dense.default:
            return 1
        result = function(*args, **(kwargs or {}))
        self._count(function, args, kwargs or {}, result)
        self._hold_all(result)
        return result

    @property
    def held_bytes(self) -> int:
        return self._live_bytes

    def hold(self, cache: Any) -> None:
        """Count the cache's tensors as held from the start."""
        for tensor in tensors_of(cache):
            self._hold(tensor)
            if tensor.dim() > 1:
                self.unread.add(tensor.untyped_storage()._cdata)
        self.begun_bytes = self._live_bytes

    def enter(self, module: nn.Module) -> None:
        self._there = self._always_there | {value.untyped_storage()._cdata for value in module.parameters()}
        self._open.append(self._sums)
        self._sums = _Sums()

    def leave(self) -> Work:
        self._there = self._always_there
        work = self._sums.work()
        self._sums = self._open.pop()
        return work

    def finish(self) -> None:
        self.outside = self._sums.work()

    def add(self, flops: float, nbytes: int) -> None:
        """An operation that was not dispatched."""
        self._sums.operations += 1
        self._sums.other_flops += flops
        self._sums.traffic_bytes += nbytes

    def add_product(self, rows: int, flops: float) -> None:
        """A product with weights that was not dispatched."""
        self._sums.operations += 1
        self._sums.products[rows] = self._sums.products.get(rows, 0.0) + flops

    def _count(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        sums = self._sums
        sums.operations += 1
        self._seen += 1
        if self._seen > _MOST_OPERATIONS:
            raise DryRunFailed(f"a pass has more than {_MOST_OPERATIONS:,} operations, some of them for each token")
        self._note_strays(args, kwargs)
        packet = getattr(function, "overloadpacket", function)
        if packet.__name__ in _VIEWS:
            return
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if self.unread:
            self._note_reads(packet.__name__, args, kwargs)
        formula = flop_registry.get(packet)
        flops = float(formula(*args, **kwargs, out_val=result)) if formula is not None else 0.0
        if formula is not None and any(value.untyped_storage()._cdata in self._weights for value in tensors):
            rows = max((_rows(value) for value in tensors if not self._is_weight(value)), default=1)
            sums.products[rows] = sums.products.get(rows, 0.0) + flops
            return
        sums.other_flops += flops
        touched = [value for value in tensors if not self._is_weight(value)]
        results = [result] if isinstance(result, torch.Tensor) else []
        sums.traffic_bytes += sum(value.nbytes for value in (*touched, *results))

    def _note_strays(self, args: Any, kwargs: Any) -> None:
        for value in leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):
                key = value.untyped_storage()._cdata
                if key in self._weights and key not in self._there:
                    self.stray_reads.add(self._names[key])

    def _note_reads(self, name: str, args: Any, kwargs: Any) -> None:
        for value in leaves((args[1:] if name in _WRITES else args, kwargs)):
            if isinstance(value, torch.Tensor):
                self.unread.discard(value.untyped_storage()._cdata)

    def _is_weight(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._weights

    def _hold_all(self, result: Any) -> None:
        if isinstance(result, torch.Tensor):
            self._hold(result)
        elif isinstance(result, (tuple, list)):
            for item in result:
                self._hold_all(item)

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held or key in self._constant:
            return
        self._held.add(key)
        nbytes = storage.nbytes()
        self._live_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._release, key, nbytes)

    def _release(self, key: int, nbytes: int) -> None:
        self._held.discard(key)
        self._live_bytes -= nbytes


class _Sums:
    def __init__(self) -> None:
        self.operations = 0
        self.products: dict[int, float] = {}
        self.other_flops = 0.0
        self.traffic_bytes = 0

    def work(self) -> Work:
        return Work(self.operations, tuple(sorted(self.products.items())), self.other_flops, self.traffic_bytes)


class Fused(TorchFunctionMode):
    """Counts what the meta device takes apart (attention, scores and all) or refuses (products grouped by expert)."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if getattr(function, "__name__", "") in ("_grouped_mm", "grouped_mm") and args[1].dim() == 3:
            return self._grouped(args[0], args[1])
        return function(*args, **kwargs)

    def _attention(self, query: Any, key: Any, value: Any, *args: Any, is_causal: bool = False, **kwargs: Any) -> torch.Tensor:
        batch, heads, rows, _ = query.shape
        pairs = batch * heads * rows * key.shape[-2]
        if is_causal and rows > 1:
            pairs //= 2
        result: torch.Tensor = query.new_empty((batch, heads, rows, value.shape[-1]))
        flops = 2.0 * pairs * (query.shape[-1] + value.shape[-1])
        self._counter.add(flops, sum(tensor.nbytes for tensor in (query, key, value, result)))
        return result

    def _grouped(self, rows: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """[rows, width] by [experts, width, out]: each expert's product has its share of the rows."""
        count = rows.shape[0]
        self._counter.add_product(max(1, count // experts.shape[0]), 2.0 * count * experts.shape[1] * experts.shape[2])
        return rows.new_empty((count, experts.shape[2]))


def tensors_of(cache: Any) -> Iterator[torch.Tensor]:
    """The tensors of a transformers cache: keys and values, and states, which are in dictionaries."""
    for layer in getattr(cache, "layers", None) or []:
        for value in vars(layer).values():
            for item in value.values() if isinstance(value, dict) else (value,):
                if isinstance(item, torch.Tensor):
                    yield item


def _rows(tensor: torch.Tensor) -> int:
    return max(1, tensor.numel() // max(1, tensor.shape[-1])) if tensor.dim() else 1
