"""The KV cache of a session: what is reserved for it, its pages where it has some, and the prefixes that are kept."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from offload.config import IDENTICAL, ROUNDING
from offload.kv.batch_generation import BatchGeneration
from offload.kv.options import KvOptions
from offload.kv.paged_cache import CATEGORY, PagedCache
from offload.kv.prefix_cache import PrefixCache
from offload.kv.prefix_store import BLOCK_TOKENS
from offload.kv.reservation import KvReservation
from offload.model.caches import new_cache
from offload.planning.predictor import Predictor
from offload.runtime.call import Call
from offload.runtime.component import Component, LivePlan
from offload.runtime.machine import Machine
from offload.scheduler.model_spec import ModelSpec, Workload
from offload.scheduler.plan import Plan
from offload.scheduler.prediction import predict


class KvComponent(Component):
    """Keys and values of one session.

    Args:
        plan: what they have of each tier.
        workload: what that is reserved for.
        live: the plan that is carried out; grows with the workload.
        predictor: weighs loading a prefix against computing it; None where the machine was not measured.
        source_key: stands for the checkpoint; None for a model that no file is known of.
    """

    name = "kv"

    def __init__(
        self,
        machine: Machine,
        options: KvOptions,
        plan: Plan,
        spec: ModelSpec,
        workload: Workload,
        live: LivePlan,
        predictor: Predictor | None,
        source_key: str | None,
    ) -> None:
        self.options = options
        self.reservation = KvReservation(spec, workload, live.grow, machine.ledger.budget_bytes or 0)
        self.paged: PagedCache | None = None
        self.prefixes: PrefixCache | None = None
        self._live = live
        self._machine = machine
        self._plan = plan
        self._spec = spec
        self._predictor = predictor
        self._source_key = source_key
        self._adopted = False
        if plan.kv.memory_bytes:
            assert spec.kv is not None
            hardware = None if predictor is None else predictor.hardware
            self.paged = PagedCache(machine, options, plan.kv, spec.kv, workload, hardware)

    def open(self, model: nn.Module, stack: ExitStack) -> None:
        if self.paged is not None:
            self.paged.open(model, stack)

    def take_slots(self, plan: Plan) -> None:
        self._plan = plan
        self._machine.ledger.set(CATEGORY, plan.kv.reserved_bytes)

    def free_slots(self) -> None:
        self._machine.ledger.set(CATEGORY, 0)

    def cache_maker(self, model: nn.Module) -> Callable[[], Any] | None:
        return None if self.paged is None else partial(self.paged.new_cache, model)

    def attach(self, model: nn.Module, stack: ExitStack) -> None:
        stack.callback(BatchGeneration(model, self._tokens, self.reservation.workload, self._machine.notes.warn).undo)
        self.prefixes = PrefixCache(
            model,
            self._machine,
            self.options,
            self._plan.rounds,
            self._source_key,
            self._loading_beats_computing,
            self._live.edited_weight,
        )

    def before_pass(self, call: Call) -> None:
        if not call.rows:
            return
        self._adopted = self.paged is not None and self.paged.adopt(call.cache)
        if self.paged is not None and self._adopted:
            self.paged.check(call.batch_size, call.cached_tokens + call.tokens)
        self.reservation.reserve_for(call, self._adopted)

    def after_pass(self, call: Call) -> None:
        if self.paged is not None and self._adopted:
            self.paged.observe()
        self.reservation.update(call.cache, call.cache_bytes, call.tokens)

    def new_cache(self, model: nn.Module) -> Any:
        """Return an empty cache, kept as the session was asked to: transformers' own where all of it stays."""
        return new_cache(model) if self.paged is None else self.paged.new_cache(model)

    def prefill(self, cache: Any, prefix: Sequence[int], batch_size: int, announce: Callable[[int], None]) -> Any:
        """Fill an empty cache with a prefix of token ids; see `PrefixCache.prefill`."""
        assert self.prefixes is not None
        return self.prefixes.prefill(cache, prefix, batch_size, announce)

    @property
    def shares_prefixes(self) -> bool:
        """The prefix that all sequences of a batch have in common is kept and read once."""
        return self._plan.kv.segments and self.options.shared_tokens > 0

    @property
    def exactness(self) -> str:
        if self.options.is_lossy:
            return self.options.level
        return ROUNDING if self._prefix_tokens() != (0, 0) else IDENTICAL

    def usage(self) -> dict[str, int | str]:
        loaded, computed = self._prefix_tokens()
        return {
            "reserved_bytes": self._plan.kv.reserved_bytes,
            "peak_bytes": self.reservation.peak_bytes,
            **({} if self.paged is None else self.paged.usage()),
            "prefix_loaded_tokens": loaded,
            "prefix_computed_tokens": computed,
        }

    def _tokens(self) -> int:
        """How many, of all sequences, what is reserved now holds keys and values of."""
        each = self._spec.kv_bytes_per_token + sum(size for _, size in self._spec.kv_sliding_windows)
        return self._plan.kv.reserved_bytes // each if each else 0

    def _prefix_tokens(self) -> tuple[int, int]:
        return (0, 0) if self.prefixes is None else (self.prefixes.loaded_tokens, self.prefixes.computed_tokens)

    def _loading_beats_computing(self, nbytes: int) -> bool:
        """Whether loading a prefix block of `nbytes` from disk is expected to beat recomputing it."""
        if self._predictor is None:
            return True
        prefill, decode = self._predictor.work(self._spec, 1, BLOCK_TOKENS, BLOCK_TOKENS)
        computed = predict(self._plan, self._spec, self._predictor.cost, prefill, decode).prefill_seconds
        return self._predictor.hardware.disk_read.seconds(nbytes) < computed
