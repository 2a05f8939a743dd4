"""The KV cache: what is reserved for it, what it takes, and more of the one when the other outgrows it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from offload.model.caches import cache_bytes, fixed_length
from offload.runtime.call import Call
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

    def reserve_for(self, call: Call, paged: bool = False) -> None:
        """A pass begins.

        Args:
            paged: its cache takes no more than it has, however long it gets.

        Raises:
            BudgetExceeded: if the cache, or what the pass holds beside it, cannot fit, whatever is given up.
        """
        reserved, planned = self.workload.kv_bytes(self._spec), self.workload.activation_bytes(self._spec)
        needed = reserved if paged else self._expected_bytes(call)
        wanted = self._workload_of(call, call.tokens)
        temporary = wanted.activation_bytes(self._spec)
        # What is reserved for a cache, and not used for one, is there for what else the pass holds.
        if needed <= reserved and temporary <= planned + (0 if call.keeps_cache else reserved):
            return
        # What passes so far asked for at once stays.
        at_once = max(self.workload.batch_size * self.workload.tokens_at_once, call.batch_size * call.tokens)
        wanted = self._workload_of(call, -(-at_once // call.batch_size))
        kv_bytes = max(reserved, int(needed * _HEADROOM))
        ways = [replace(wanted, least_kv_bytes=nbytes) for nbytes in (kv_bytes, max(reserved, needed))]
        if not call.keeps_cache:
            ways.append(replace(wanted, total_tokens=0))
        try:
            self._try(ways)
        except BudgetTooSmall as error:
            raise self._exceeded(call, needed, temporary, error) from error

    def _workload_of(self, call: Call, pass_tokens: int) -> Workload:
        now = self.workload
        context = max(now.context_tokens, now.total_tokens, call.cached_tokens + call.tokens)
        return Workload(call.batch_size, 0, pass_tokens, 0, now.micro_batch, context_tokens=context, paged=now.paged)

    def _exceeded(self, call: Call, needed: int, temporary: int, error: BudgetTooSmall) -> BudgetExceeded:
        cache = f"{gib(needed)} of KV cache and " if needed else ""
        return BudgetExceeded(
            f"a pass of {call.batch_size} x {call.tokens} needs {cache}{gib(temporary)} for temporaries, of a budget of "
            f"{gib(self._budget_bytes)}. With every block given up that can be, {gib(error.least_bytes)} "
            f"({error.least_bytes} bytes) would do. Give a larger {'cpu_memory' if error.of_host else 'budget'}, or compute "
            "less at once: a smaller batch, shorter prompts and answers.",
            error.least_bytes,
        )

    def update(self, cache: Any, before_bytes: int, tokens: int) -> None:
        """A pass is over that added `tokens` positions to what took `before_bytes`."""
        now = cache_bytes(cache)
        if before_bytes:
            # Of the first pass it cannot be told what grows with the tokens and what is there at once.
            self._bytes_per_token = max(0, now - before_bytes) / max(tokens, 1)
        self.peak_bytes = max(self.peak_bytes, now)

    def _try(self, ways: Sequence[Workload]) -> None:
        """Take the first of the ways that fits."""
        for way in ways:
            try:
                self._grow(way)
            except BudgetTooSmall:
                if way is ways[-1]:
                    raise
            else:
                self.workload = way
                return

    def _expected_bytes(self, call: Call) -> int:
        held, fixed = call.cache_bytes, fixed_length(call.cache)
        if not call.keeps_cache:
            return 0
        if not held:
            return Workload(call.batch_size, max(call.tokens, fixed), call.tokens).kv_bytes(self._spec)
        if fixed:
            return held
        learned = self._bytes_per_token
        each = call.batch_size * self._spec.kv_bytes_per_token if learned is None else learned
        return held + int(call.tokens * each)
