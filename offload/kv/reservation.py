"""The KV cache: what is reserved for it, what it takes, and more of the one when the other outgrows it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from offload.model.caches import cache_bytes, fixed_length
from offload.scheduler.model_spec import ModelSpec, Workload
from offload.storage.errors import BudgetExceeded, BudgetTooSmall, gib

_HEADROOM = 1.25
"""Reserve somewhat more than the next pass needs, so that not every pass makes a new plan."""


class KvReservation:
    """Sees to it that a pass never begins whose KV cache would not fit.

    Args:
        spec: of the model.
        workload: what the present plan reserves for.
        grow: makes a new plan for a larger workload; raises BudgetTooSmall if there is none.
        budget_bytes: of the device, for the message.
    """

    def __init__(self, spec: ModelSpec, workload: Workload, grow: Callable[[Workload], None], budget_bytes: int) -> None:
        self.workload = workload
        self.peak_bytes = 0
        self._spec = spec
        self._grow = grow
        self._budget_bytes = budget_bytes
        self._bytes_per_token: float | None = None

    def reserve_for(self, cache: Any, batch_size: int, tokens: int, cached_tokens: int = 0, paged: bool = False) -> None:
        """A pass begins.

        Args:
            cache: as passed to the model; None or empty at first.
            tokens: positions that the pass adds, of each of the `batch_size` sequences.
            cached_tokens: positions that the cache holds already.
            paged: it takes no more than it has, however long it gets.

        Raises:
            BudgetExceeded: if the cache cannot fit after it, whatever is given up.
        """
        reserved = self.workload.kv_bytes(self._spec)
        needed = reserved if paged else self._expected_bytes(cache, batch_size, tokens)
        context = max(self.workload.context_tokens, self.workload.total_tokens, cached_tokens + tokens)
        micro_batch, kv = self.workload.micro_batch, self.workload.paged
        wanted = Workload(batch_size, 0, tokens, 0, micro_batch, context_tokens=context, paged=kv)
        if needed <= reserved and wanted.activation_bytes(self._spec) <= self.workload.activation_bytes(self._spec):
            return
        at_once = max(self.workload.batch_size * self.workload.tokens_at_once, batch_size * tokens)
        kv_bytes = max(reserved, int(needed * _HEADROOM))
        wanted = replace(wanted, pass_tokens=-(-at_once // batch_size), least_kv_bytes=kv_bytes)
        try:
            self._try(wanted, replace(wanted, least_kv_bytes=max(reserved, needed)))
        except BudgetTooSmall as error:
            raise BudgetExceeded(
                f"the KV cache needs {gib(needed)} for {batch_size} x {tokens} more tokens, and {gib(reserved)} is reserved of "
                f"a budget of {gib(self._budget_bytes)}. With every block given up that can be, {gib(error.least_bytes)} would "
                "do. Give a larger budget, a shorter prompt, fewer new tokens, or a smaller batch."
            ) from error

    def update(self, cache: Any, before_bytes: int, tokens: int) -> None:
        """A pass is over that added `tokens` positions to what took `before_bytes`."""
        now = cache_bytes(cache)
        if before_bytes:
            # Of the first pass it cannot be told what grows with the tokens and what is there at once.
            self._bytes_per_token = max(0, now - before_bytes) / max(tokens, 1)
        self.peak_bytes = max(self.peak_bytes, now)

    def _try(self, wanted: Workload, least: Workload) -> None:
        try:
            self._grow(wanted)
            self.workload = wanted
        except BudgetTooSmall:
            self._grow(least)
            self.workload = least

    def _expected_bytes(self, cache: Any, batch_size: int, tokens: int) -> int:
        held, fixed = cache_bytes(cache), fixed_length(cache)
        if not held:
            return Workload(batch_size, max(tokens, fixed), tokens).kv_bytes(self._spec)
        if fixed:
            return held
        learned = self._bytes_per_token
        return held + int(tokens * (batch_size * self._spec.kv_bytes_per_token if learned is None else learned))
