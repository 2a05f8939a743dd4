"""One call of the whole model: what is checked before it, and what is counted around it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import Cache

from offload.model.caches import cache_bytes, cached_tokens
from offload.model.pytree import to_device
from offload.runtime.call import Call, CallKind, Row
from offload.runtime.machine import Machine
from offload.runtime.module_wrappers import Forward
from offload.scheduler.phases import PREFILL

_CACHES = ("past_key_values", "cache_params")
_INPUTS = ("decoder_input_ids", "input_ids", "decoder_inputs_embeds", "inputs_embeds")


class ModelPass:
    """Wraps the model's own forward.

    Args:
        before: called with each call of the model before it runs; what it raises ends it.
        after: called with each call that succeeded.
        over: called after each call, whatever came of it.
        prefill_chunk: tokens of a prompt that one pass computes; 0 for all.
        new_cache: makes the cache that a pass is to keep its keys and values in, where the model would make its own; None to
            leave that to the model.
        caches: the model keeps keys and values where it is not told.
    """

    def __init__(
        self,
        machine: Machine,
        before: Callable[[Call], None],
        after: Callable[[Call], None],
        over: Callable[[], None],
        prefill_chunk: int,
        new_cache: Callable[[], Any] | None,
        caches: bool,
    ) -> None:
        self._device = machine.device
        self._lock = machine.lock
        self._clock = machine.clock
        self._before = before
        self._after = after
        self._over = over
        self._prefill_chunk = prefill_chunk
        self._new_cache, self._caches = new_cache, caches
        self._last_tokens = 0
        """Tokens of the prompt's last chunk; 0 once it is decoding."""
        self._prompt_passes_left = 0
        self._running = False
        self._together = False

    def prompt_goes_on(self, passes: int) -> None:
        """After the next pass so many are of the same prompt."""
        self._prompt_passes_left = passes

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Several calls of the model count as one pass."""
        self._before(Call(CallKind.PREFILL))
        self._clock.begin_pass(PREFILL, 0, 0, 0)
        self._together = True
        try:
            yield
        finally:
            self._together = False
            self._clock.end_pass()
            self._over()

    def wrap(self, forward: Forward) -> Forward:
        def passed(*args: Any, **kwargs: Any) -> Any:
            # A second thread waits here until the first one's pass is over.
            with self._lock:
                if self._together:
                    sequences, tokens = _shape_of(args, kwargs)
                    self._clock.phases[PREFILL].tokens += sequences * tokens
                    return forward(*to_device(args, self._device.torch_device), **to_device(kwargs, self._device.torch_device))
                if self._running:
                    return forward(*args, **kwargs)
                self._running = True
                try:
                    return self._run(forward, args, kwargs)
                finally:
                    self._running = False

        return passed

    def _run(self, forward: Forward, args: Any, kwargs: Any) -> Any:
        # Inputs are accepted from either device.
        args, kwargs = to_device(args, self._device.torch_device), to_device(kwargs, self._device.torch_device)
        call = self._call_of(args, kwargs)
        if call.cache is None and call.keeps_cache and call.rows and self._new_cache is not None:
            kwargs = {**kwargs, _CACHES[0]: self._new_cache()}
            call = replace(call, cache=kwargs[_CACHES[0]])
        self._before(call)
        self._prompt_passes_left -= int(self._prompt_passes_left > 0 and (call.continues or call.kind is CallKind.DECODE))
        self._last_tokens = call.tokens if call.kind is CallKind.PREFILL else 0
        self._clock.begin_pass(call.kind.phase, call.tokens, call.batch_size, call.cached_tokens, call.continues)
        try:
            output = forward(*args, **kwargs)
            if not self._device.shares_host_memory:
                # Only compute is waited for; what was prefetched goes on.
                self._device.record().synchronize()
        finally:
            for begin, end in self._device.ended_stalls():
                self._clock.charge_wait(self._device.copy_link, begin, end)
            self._clock.end_pass()
            self._over()
        self._after(replace(call, cache=call.cache if call.cache is not None else _cache_in(output)))
        return output

    def _call_of(self, args: Any, kwargs: Any) -> Call:
        given = (*(kwargs.get(name) for name in _CACHES), *(value for value in args if isinstance(value, Cache)))
        cache = next((value for value in given if value is not None), None)
        batch_size, tokens = _shape_of(args, kwargs)
        held, length = cache_bytes(cache), cached_tokens(cache)
        # A cache that was made in advance holds bytes and no tokens.
        cached = bool(length) if length is not None else bool(held)
        # A chunk of a prompt follows a whole one; what checks guessed tokens follows anything.
        announced = self._prompt_passes_left > 0
        continues = cached and tokens > 1 and (announced or self._last_tokens == self._prefill_chunk)
        kind = CallKind.DECODE if cached and not continues else CallKind.PREFILL
        rows = tuple(Row(index, length or 0, tokens) for index in range(batch_size))
        use_cache = kwargs.get("use_cache")
        keeps = cache is not None or (self._caches if use_cache is None else bool(use_cache))
        return Call(kind, rows, cache, held, continues, keeps)


def _shape_of(args: Any, kwargs: Any) -> tuple[int, int]:
    """Sequences, and positions of each, of the model's main input."""
    named = [kwargs[name] for name in _INPUTS if isinstance(kwargs.get(name), torch.Tensor)]
    tensors = [value for value in (*named, *args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    if not tensors or tensors[0].dim() == 0:
        return 1, 1
    first = tensors[0]
    # Images and sounds have no tokens to count: their shape says nothing about a KV cache.
    has_tokens = bool(named) or (first.dim() == 2 and not first.is_floating_point())
    return first.shape[0], first.shape[1] if has_tokens and first.dim() > 1 else 1


def _cache_in(output: Any) -> Any:
    return next((getattr(output, name) for name in _CACHES if getattr(output, name, None) is not None), None)
