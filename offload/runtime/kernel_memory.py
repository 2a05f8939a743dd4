"""What a CPU's kernels and allocator keep, held back where the process comes to hold more than its budget.

oneDNN keeps a compiled primitive for each shape that a product had, of some 0.5 to 1 MB each, and code that is never freed: a
mixture's experts have another number of rows each time. The allocator keeps what was freed in pieces.
"""

import time
from collections.abc import Callable

from offload.runtime.module_wrappers import Forward
from offload.runtime.padded_products import PaddedProducts
from offload.storage.host_buffer import keep_large_tensors_apart, release_freed_memory
from offload.storage.process_memory import anonymous_bytes, process_bytes

_STEP_BYTES = 8 << 20
_TOLERATED_BYTES = 32 << 20
"""Beyond the budget: kernels' own code, which nobody gets back."""

_GROWTH_BYTES = 1 << 20
_GLANCE_SECONDS = 0.004
"""In less, no kernel takes much; to ask takes 0.06 ms between two layers, where nothing of it is in the processor's caches."""


class KernelMemory:
    """Looks now and then at what the process holds.

    Args:
        limit_bytes: of the process between two layers: what it held before, and the budget without what a layer computes with.
        budget_bytes: of the process at any time: what it held before, and the budget.
        held_bytes: says what the process holds.
        give_back: gives what was freed back to the system.
        keep_apart: has large tensors go back by themselves, from then on, at a price.
    """

    def __init__(
        self,
        limit_bytes: int,
        budget_bytes: int,
        held_bytes: Callable[[], int] = process_bytes,
        give_back: Callable[[], None] = release_freed_memory,
        keep_apart: Callable[[], None] = keep_large_tensors_apart,
    ) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = held_bytes
        self._give_back = give_back
        self._keep_apart = keep_apart
        self._most_bytes = budget_bytes + _TOLERATED_BYTES
        self._apart = False
        self._step_bytes = _STEP_BYTES
        self._products = PaddedProducts()
        self._is_short = False
        self._seen_bytes = 0
        self._seen_at = 0.0

    def glance(self) -> None:
        """Check, if the process has grown since it was looked at; asked again at once, it is taken to hold what it held."""
        if time.perf_counter() - self._seen_at < _GLANCE_SECONDS:
            return
        self._seen_at = time.perf_counter()
        now = anonymous_bytes()
        if now < self._seen_bytes + _GROWTH_BYTES:
            self._seen_bytes = min(now, self._seen_bytes)
            return
        self.check()
        self._seen_bytes = anonymous_bytes()

    def check(self) -> None:
        """Give back what is kept, if the process holds more than it may; from then on less is kept, at the price of some speed.

        Where that is little, what it holds is somebody else's: that much more is let be before it is tried again.
        """
        held = self._held_bytes()
        if held > self._most_bytes and not self._apart:
            self._apart = True
            self._keep_apart()
        if held <= self._limit_bytes:
            return
        self._is_short = True
        self._give_back()
        left = self._held_bytes()
        gave_much = held - left >= _STEP_BYTES // 2
        self._step_bytes = _STEP_BYTES if gave_much else 2 * self._step_bytes
        if left > self._limit_bytes or not gave_much:
            self._limit_bytes = max(self._limit_bytes, left + self._step_bytes)

    def before_prompt(self) -> None:
        """Give back what the last answer left, such as its KV cache, once memory is short: what comes is of other sizes."""
        if self._is_short:
            self._give_back()

    def few_sizes(self, forward: Forward) -> Forward:
        """Wrap the forward of a module of experts."""

        def padded(*args: object, **kwargs: object) -> object:
            if not self._is_short:
                return forward(*args, **kwargs)
            with self._products:
                return forward(*args, **kwargs)

        return padded
