"""A pass of the model without values: what each module computes, and how much memory is held at most.

Runs the model's own code on torch's meta device, so that no formula of an architecture is needed.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import nn

from offload.model.blocks import WHOLE_BLOCKS, Structure, TakenApart, Unit, find_structure
from offload.model.micro_batch import MicroBatches
from offload.planning.counted_work import CountedWork
from offload.planning.operations import Counter, DryRunFailed, Fused, tensors_of
from offload.scheduler.model_spec import BlockRole
from offload.scheduler.work import ModuleWork, PassWork

_CACHES = ("past_key_values", "cache_params")
PREFILL, DECODE = "prefill", "decode"

Counted = TypeVar("Counted")


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


def _is_on_meta(model: nn.Module) -> bool:
    return all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def _are_alike(one: nn.Module, other: nn.Module) -> bool:
    """The same modules with the same tensors by the same names; what is tied in one is tied in the other."""
    return one is other or _description(one) == _description(other)


def _description(model: nn.Module) -> list[Any]:
    modules = [(name, type(module), "forward" in vars(module)) for name, module in model.named_modules()]
    parameters = [(name, value.shape, value.dtype) for name, value in model.named_parameters()]
    buffers = [(name, value.shape, value.dtype) for name, value in model.named_buffers()]
    config = getattr(model, "config", None)
    return [modules, parameters, buffers, getattr(config, "_attn_implementation", None)]


class DryRun:
    """Traces passes of one model.

    Args:
        model: on the meta device, or any; it is copied there, and not kept.
        by_submodule: units that are taken apart.
        micro_batch: sequences that a layer computes at once; 0 for all.
        outline: the same model on the meta device, if there is one; it is used instead of a copy if it is indeed the same.
    """

    def __init__(
        self,
        model: nn.Module,
        by_submodule: TakenApart = WHOLE_BLOCKS,
        micro_batch: int = 0,
        outline: nn.Module | None = None,
    ) -> None:
        self._given, self._by_submodule, self._outline = model, by_submodule, outline
        self._counted = CountedWork(model, by_submodule, micro_batch)
        self._micro_batch = micro_batch

    @cached_property
    def model(self) -> nn.Module:
        """On the meta device; made when something is counted that was not counted before."""
        for known in (self._given, self._outline):
            if known is not None and _is_on_meta(known) and _are_alike(known, self._given):
                return known.eval()
        return meta_twin(self._given).eval()

    def keep_twin(self) -> "DryRun":
        """Make the copy on the meta device now: a model that is offloaded cannot be copied.

        Raises:
            DryRunFailed: if a part of the model cannot be.
        """
        _ = self._structure
        return self

    @cached_property
    def _structure(self) -> Structure:
        return find_structure(self.model, self._by_submodule)

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
        return self._run(PREFILL, batch_size, tokens, None).work

    def continued(self, batch_size: int, tokens: int, context_tokens: int) -> PassWork:
        """A pass of `tokens` after `context_tokens` that the KV cache holds: a chunk of a prompt.

        Raises:
            DryRunFailed: if the model cannot be run without values, or keeps no cache.
        """
        return self._known((batch_size, tokens, context_tokens), self._continued)

    def _continued(self, batch_size: int, tokens: int, context_tokens: int) -> PassWork:
        cache = self._run(PREFILL, batch_size, context_tokens, None).cache
        if cache is None:
            raise DryRunFailed("it returns no cache")
        return self._run(PREFILL, batch_size, tokens, cache).work

    def reads_its_cache(self) -> bool:
        """Whether a pass of several tokens looks at all that the passes before it left in the cache.

        Some models' recurrent layers take their state up for a single token only: a prompt in pieces would be another one.

        Raises:
            DryRunFailed: if the model cannot be run without values, or keeps no cache.
        """
        return self._known((1, 2, 2), self._reads_its_cache)

    def _reads_its_cache(self, batch_size: int, tokens: int, context_tokens: int) -> bool:
        cache = self._run(PREFILL, batch_size, context_tokens, None).cache
        if cache is None:
            raise DryRunFailed("it returns no cache")
        return not self._run(PREFILL, batch_size, tokens, cache).counter.unread

    def stray_reads(self) -> frozenset[str]:
        """Names of weights that are used while no unit that has them is called: by code around it.

        Raises:
            DryRunFailed: if the model cannot be run without values.
        """
        return self._known((1, 2), self._stray_reads)

    def _stray_reads(self, batch_size: int, tokens: int) -> frozenset[str]:
        prompt = self._run(PREFILL, batch_size, tokens, None, guesses=True)
        try:
            # Some code computes a single token in a way of its own.
            token = self._run(DECODE, batch_size, 1, prompt.cache, guesses=True)
        except DryRunFailed:
            return frozenset(prompt.counter.stray_reads)
        return frozenset(prompt.counter.stray_reads | token.counter.stray_reads)

    def cache_bytes(self, tokens: int) -> int:
        """What the cache of one sequence takes after a prompt of so many tokens.

        Raises:
            DryRunFailed: if the model cannot be run without values.
        """
        return self._known((1, tokens), self._cache_bytes)

    def _cache_bytes(self, batch_size: int, tokens: int) -> int:
        return _cache_bytes(self._run(PREFILL, batch_size, tokens, None).cache)

    def _passes(self, batch_size: int, prompt_tokens: int, context_tokens: int) -> tuple[PassWork, PassWork]:
        prefill = self._run(PREFILL, batch_size, prompt_tokens, None).work
        cache = self._run(PREFILL, batch_size, max(1, context_tokens), None).cache
        if cache is None:
            raise DryRunFailed("it returns no cache")
        decode = self._run(DECODE, batch_size, 1, cache).work
        return prefill, decode

    def _known(self, shape: tuple[int, ...], count: Callable[..., Counted]) -> Counted:
        """What was counted already of a model like this one."""
        return self._counted.get(count.__name__, shape, lambda: count(*shape))

    def _run(self, phase: str, batch_size: int, tokens: int, cache: Any, guesses: bool = False) -> "_Counted":
        counter = Counter(self.model, self._structure.always_resident.values(), guesses)
        counter.hold(cache)
        inputs = self._inputs(batch_size, tokens)
        if cache is not None:
            inputs["past_key_values"] = cache
        scopes = _ModuleScopes(self._structure.units, counter, self._micro_batch)
        try:
            # What the user compiled would be looked at now, and given up for good: there are no values.
            with torch.compiler.set_stance("force_eager"), torch.no_grad(), Fused(counter), counter, scopes:
                output = self.model(**inputs)
        except DryRunFailed:
            raise
        except Exception as error:
            raise DryRunFailed(_first_line(error)) from error
        cache = next((getattr(output, name) for name in _CACHES if getattr(output, name, None) is not None), None)
        temporary = max(0, counter.peak_bytes - _cache_bytes(cache))
        between = min(temporary, scopes.between_bytes)
        work = PassWork(phase, batch_size, tokens, tuple(scopes.called), counter.outside, temporary, between)
        return _Counted(work, cache, counter)

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


@dataclass(frozen=True, slots=True)
class _Counted:
    """One pass: what it takes, the cache that it left, and what else was seen."""

    work: PassWork
    cache: Any
    counter: Counter


class _ModuleScopes:
    """Notes the calls of the units while active."""

    def __init__(self, units: list[Unit], counter: Counter, micro_batch: int) -> None:
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
            self._counter.enter(unit.module)
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


def _result_bytes(result: Any) -> list[int]:
    if isinstance(result, torch.Tensor):
        return [result.nbytes]
    return [item.nbytes for item in result if isinstance(item, torch.Tensor)] if isinstance(result, (tuple, list)) else []


def _cache_bytes(cache: Any) -> int:
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors_of(cache)}.values())


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
