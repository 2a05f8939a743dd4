"""A pass of the model without values: what each module computes, and how much memory is held at most.

Runs the model's own code on torch's meta device, so that no formula of an architecture is needed.
"""

import copy
import inspect
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedConfig

from offload.model.blocks import Structure, Unit, find_structure
from offload.model.micro_batch import MicroBatches
from offload.scheduler.model_spec import BlockRole
from offload.scheduler.work import ModuleWork, PassWork, Work
from offload.storage.blocks import BlockKey

_CACHES = ("past_key_values", "cache_params")
# fmt: off
_VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "split", "alias",
    "detach", "unbind", "_reshape_alias", "as_strided", "split_with_sizes", "chunk", "lift_fresh",
}
# fmt: on


PREFILL, DECODE = "prefill", "decode"

_MOST_OPERATIONS = 40_000
"""A model of 200 layers has less; one that loops over its tokens would take minutes."""

_MOST_COUNTED = 64
Counted = TypeVar("Counted")

_counted: dict[Any, Any] = {}
"""Sessions of one model follow one another: its work is counted once."""


class DryRunFailed(Exception):
    """The model's code needs values (a branch on them, say) or inputs that are not known here."""


def meta_twin(model: nn.Module) -> nn.Module:
    """The same modules with parameters and buffers that hold no memory.

    Raises:
        DryRunFailed: if a part of the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise DryRunFailed(f"it cannot be copied: {_first_line(error)}") from error
    for module in twin.modules():
        # A user's hooks are not for this.
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin


class DryRun:
    """Traces passes of one model.

    Args:
        model: on the meta device, or any; it is copied there, and not kept.
        split: keys of blocks that are taken apart.
        micro_batch: sequences that a layer computes at once; 0 for all.
    """

    def __init__(self, model: nn.Module, by_submodule: frozenset[BlockKey] = frozenset(), micro_batch: int = 0) -> None:
        on_meta = all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        self.model = (model if on_meta else meta_twin(model)).eval()
        """On the meta device."""
        self._structure: Structure = find_structure(self.model, by_submodule)
        self._identity = _identity(model, by_submodule, micro_batch)
        self._micro_batch = micro_batch

    def passes(self, batch_size: int, prompt_tokens: int, context_tokens: int) -> tuple[PassWork, PassWork]:
        """A prefill of `prompt_tokens`, and a decode step after `context_tokens`.

        Raises:
            DryRunFailed: if the model cannot be run without values.
        """
        return self._known((batch_size, prompt_tokens, context_tokens), self._passes)

    def forward(self, batch_size: int, tokens: int) -> PassWork:
        """One pass without a cache.

        Raises:
            DryRunFailed: if the model cannot be run without values.
        """
        return self._known((batch_size, tokens), self._forward)

    def _forward(self, batch_size: int, tokens: int) -> PassWork:
        return self._trace(PREFILL, batch_size, tokens, None)[0]

    def continued(self, batch_size: int, tokens: int, context_tokens: int) -> PassWork:
        """A pass of `tokens` after `context_tokens` that the KV cache holds: a chunk of a prompt.

        Raises:
            DryRunFailed: if the model cannot be run without values, or keeps no cache.
        """
        return self._known((batch_size, tokens, context_tokens), self._continued)

    def _continued(self, batch_size: int, tokens: int, context_tokens: int) -> PassWork:
        _, cache = self._trace(PREFILL, batch_size, context_tokens, None)
        if cache is None:
            raise DryRunFailed("it returns no cache")
        return self._trace(PREFILL, batch_size, tokens, cache)[0]

    def _passes(self, batch_size: int, prompt_tokens: int, context_tokens: int) -> tuple[PassWork, PassWork]:
        prefill, _ = self._trace(PREFILL, batch_size, prompt_tokens, None)
        _, cache = self._trace(PREFILL, batch_size, max(1, context_tokens), None)
        if cache is None:
            raise DryRunFailed("it returns no cache")
        decode, _ = self._trace(DECODE, batch_size, 1, cache)
        return prefill, decode

    def _known(self, shape: tuple[int, ...], count: Callable[..., Counted]) -> Counted:
        """What was counted already of a model like this one."""
        if self._identity is None:
            return count(*shape)
        key = (self._identity, count.__qualname__, shape)
        if key not in _counted:
            if len(_counted) >= _MOST_COUNTED:
                _counted.pop(next(iter(_counted)))
            _counted[key] = count(*shape)
        return cast(Counted, _counted[key])

    def _trace(self, phase: str, batch_size: int, tokens: int, cache: Any) -> tuple[PassWork, Any]:
        counter = _Counter(self.model)
        counter.hold(cache)
        inputs = self._inputs(batch_size, tokens)
        if cache is not None:
            inputs["past_key_values"] = cache
        scopes = _ModuleScopes(self._structure.units, counter, self._micro_batch)
        try:
            # What the user compiled would be looked at now, and given up for good: there are no values.
            with torch.compiler.set_stance("force_eager"), torch.no_grad(), _Fused(counter), counter, scopes:
                output = self.model(**inputs)
        except DryRunFailed:
            raise
        except Exception as error:
            raise DryRunFailed(_first_line(error)) from error
        cache = next((getattr(output, name) for name in _CACHES if getattr(output, name, None) is not None), None)
        temporary = max(0, counter.peak_bytes - _cache_bytes(cache))
        between = min(temporary, scopes.between_bytes)
        return PassWork(phase, batch_size, tokens, tuple(scopes.called), counter.outside, temporary, between), cache

    def _inputs(self, batch_size: int, tokens: int) -> dict[str, Any]:
        taken = inspect.signature(self.model.forward).parameters
        ids = torch.zeros(batch_size, tokens, dtype=torch.long, device="meta")
        if "input_ids" not in taken:
            raise DryRunFailed("it takes no input_ids")
        inputs: dict[str, Any] = {"input_ids": ids}
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            raise DryRunFailed("encoder and decoder see inputs of different lengths")
        if "use_cache" in taken:
            inputs["use_cache"] = True
        if "logits_to_keep" in taken:
            # As `generate` does.
            inputs["logits_to_keep"] = 1
        return inputs


class _Counter(TorchDispatchMode):
    """Sums up operations, and the memory that their results hold."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outside = Work()
        self.peak_bytes = 0
        self.begun_bytes = 0
        self._live_bytes = 0
        self._weights = {value.untyped_storage()._cdata for value in model.parameters()}
        self._constant = {value.untyped_storage()._cdata for value in model.buffers()} | self._weights
        self._held: set[int] = set()
        self._open: list[_Sums] = []
        self._sums = _Sums()
        self._seen = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self._count(function, args, kwargs or {}, result)
        self._hold_all(result)
        return result

    @property
    def held_bytes(self) -> int:
        return self._live_bytes

    def hold(self, cache: Any) -> None:
        """Count the cache's tensors as held from the start."""
        for tensor in _tensors_of(cache):
            self._hold(tensor)
        self.begun_bytes = self._live_bytes

    def enter(self) -> None:
        self._open.append(self._sums)
        self._sums = _Sums()

    def leave(self) -> Work:
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
        packet = getattr(function, "overloadpacket", function)
        if packet.__name__ in _VIEWS:
            return
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
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


class _Fused(TorchFunctionMode):
    """Counts what the meta device takes apart (attention, scores and all) or refuses (products grouped by expert)."""

    def __init__(self, counter: _Counter) -> None:
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


class _ModuleScopes:
    """Notes the calls of the units while active."""

    def __init__(self, units: list[Unit], counter: _Counter, micro_batch: int) -> None:
        self.called: list[ModuleWork] = []
        self.between_bytes = 0
        """What is held around the layers, the result of one included."""
        self._parts = MicroBatches(micro_batch, micro_batch, _refuse) if micro_batch else None
        self._units = units
        self._counter = counter
        self._depth = 0

    def __enter__(self) -> None:
        for unit in self._units:
            unit.module.forward = self._wrap(unit, unit.module.forward)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for unit in self._units:
            del unit.module.__dict__["forward"]
        self._counter.finish()

    def _wrap(self, unit: Unit, forward: Callable[..., Any]) -> Callable[..., Any]:
        if self._parts is not None and unit.role is BlockRole.LAYER:
            forward = self._parts.wrap(forward)

        def called(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return forward(*args, **kwargs)
            self._depth += 1
            around = self._counter.held_bytes
            self._counter.enter()
            try:
                result = forward(*args, **kwargs)
            finally:
                work = self._counter.leave()
                self._depth -= 1
            if unit.role is BlockRole.LAYER and not self.between_bytes:
                # The first layer's: later on the KV cache is among what is held.
                self.between_bytes = around - self._counter.begun_bytes + sum(_result_bytes(result))
            rows = args[0].numel() if unit.fetches_rows and args and isinstance(args[0], torch.Tensor) else 0
            self.called.append(ModuleWork(unit.key, unit.uses, work, sum(_result_bytes(result)), rows))
            return result

        return called


def _refuse(reason: str) -> None:
    raise DryRunFailed(reason)


def _identity(model: nn.Module, by_submodule: frozenset[BlockKey], micro_batch: int) -> tuple[Any, ...] | None:
    """Equal for models that compute the same: class, config, kinds and sizes of their modules; None without a config."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return None
    modules = tuple(type(module) for module in model.modules())
    shapes = tuple((value.shape, value.dtype) for value in model.parameters())
    return type(model), config.to_json_string(), config._attn_implementation, modules, shapes, by_submodule, micro_batch


def _result_bytes(result: Any) -> list[int]:
    if isinstance(result, torch.Tensor):
        return [result.nbytes]
    return [item.nbytes for item in result if isinstance(item, torch.Tensor)] if isinstance(result, (tuple, list)) else []


def _tensors_of(cache: Any) -> list[torch.Tensor]:
    layers = getattr(cache, "layers", None) or []
    return [value for layer in layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]


def _cache_bytes(cache: Any) -> int:
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in _tensors_of(cache)}.values())


def _rows(tensor: torch.Tensor) -> int:
    return max(1, tensor.numel() // max(1, tensor.shape[-1])) if tensor.dim() else 1


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
