"""Who holds how much of a tier, against a hard budget."""

import threading
from collections import defaultdict
from collections.abc import Callable

from offload.storage.blocks import Tier
from offload.storage.errors import BudgetExceeded, gib


class MemoryLedger:
    """Counts every byte that the runtime holds on one tier, by category.

    Args:
        tier: the tier that is counted.
        budget_bytes: what may be held at most; None for a tier without a limit.
        on_change: told (tier, category, bytes held now) of every change.
        parent: the ledger of all who share the tier, which is charged for the same bytes.
    """

    def __init__(
        self,
        tier: Tier,
        budget_bytes: int | None,
        on_change: Callable[[str, str, int], None] = lambda *change: None,
        parent: "MemoryLedger | None" = None,
    ) -> None:
        self.tier = tier
        self._parent = parent
        self.budget_bytes = budget_bytes
        self.peak_bytes = 0
        self._on_change = on_change
        self._held: defaultdict[str, int] = defaultdict(int)
        self._peak_held: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        return sum(self._held.values())

    @property
    def free_bytes(self) -> int | None:
        """Bytes left under the budget, the parent's too; None without one."""
        left = [] if self.budget_bytes is None else [self.budget_bytes - self.used_bytes]
        if self._parent is not None and self._parent.free_bytes is not None:
            left.append(self._parent.free_bytes)
        return min(left, default=None)

    def held_bytes(self, category: str) -> int:
        return self._held.get(category, 0)

    def by_category_at_peak(self) -> dict[str, int]:
        return dict(self._peak_held)

    def charge(self, category: str, nbytes: int) -> None:
        """Count `nbytes` more.

        Raises:
            BudgetExceeded: if that would pass the budget; nothing is counted then.
        """
        with self._lock:
            if self.budget_bytes is not None and self.used_bytes + nbytes > self.budget_bytes:
                raise BudgetExceeded(self._refusal(category, nbytes), self.used_bytes + nbytes)
            if self._parent is not None:
                self._parent.charge(category, nbytes)
            self._held[category] += nbytes
            self._on_change(self.tier.value, category, self._held[category])
            if self.used_bytes > self.peak_bytes:
                self.peak_bytes = self.used_bytes
                self._peak_held = {name: held for name, held in self._held.items() if held}

    def release(self, category: str, nbytes: int) -> None:
        with self._lock:
            if nbytes > self._held[category]:
                raise AssertionError(f"{category} gives back {nbytes} bytes and holds {self._held[category]}")
            self._held[category] -= nbytes
            if self._parent is not None:
                self._parent.release(category, nbytes)
            self._on_change(self.tier.value, category, self._held[category])

    def set(self, category: str, nbytes: int) -> None:
        """Make the category hold exactly `nbytes`.

        Raises:
            BudgetExceeded: as `charge` does.
        """
        change = nbytes - self.held_bytes(category)
        if change >= 0:
            self.charge(category, change)
        else:
            self.release(category, -change)

    def _refusal(self, category: str, nbytes: int) -> str:
        held = ", ".join(f"{name} {gib(count)}" for name, count in sorted(self._held.items()) if count)
        return (
            f"{category} needs {gib(nbytes)} more of the {self.tier.value} memory, whose budget is "
            f"{gib(self.budget_bytes or 0)} and of which {gib(self.used_bytes)} is held ({held or 'nothing'}). "
            "Give a larger budget, or less to compute at once: a smaller batch, shorter sequences."
        )
