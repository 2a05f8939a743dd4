"""What a user may ask of the KV cache."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from offload.config import parse_bytes
from offload.kv.policies.base import FullAttention, LayerPolicy
from offload.kv.policies.budget import KvBudget
from offload.kv.policies.retrieve import INDEX_SHARE, Retrieve, page_tokens
from offload.kv.policies.window import Window
from offload.kv.quantization import PageQuantizer
from offload.storage.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Method:
    """A way to keep and read keys and values: what a full page becomes, which pages are kept, how they are read.

    Attributes:
        codec: of full pages; None to keep them as they are.
        policy: makes what one layer remembers, given the budget; of `KeepAll`'s kind where nothing is left out.
        takes_budget: there is something to choose.
        page_tokens: of each sequence in one page, given all there will be, where the method depends on it.
        index_share: of all bytes, what is kept on the device to choose by.
    """

    codec: PageQuantizer | None = None
    policy: Callable[[KvBudget], LayerPolicy] | None = None
    page_tokens: Callable[[int], int] | None = None
    index_share: float = 0.0

    @property
    def takes_budget(self) -> bool:
        return self.policy is not None


NONE = "none"

METHODS = {
    NONE: Method(),
    "int8": Method(codec=PageQuantizer(8)),
    "int4": Method(codec=PageQuantizer(4)),
    "window": Method(policy=Window),
    "retrieve": Method(policy=Retrieve, page_tokens=page_tokens, index_share=INDEX_SHARE),
}

_DEFAULT_BUDGET = KvBudget(share=0.25)


@dataclass(frozen=True, slots=True)
class KvOptions:
    """How keys and values are kept.

    Attributes:
        memory_bytes: device memory for pages; None: as the planner decides.
        policy: a name of `METHODS`; anything but `none` is lossy.
        budget: what queries see, of the methods that choose; None for a quarter of the context.
        shared_tokens: that all sequences of a batch begin with: kept once, and read once for all of them.
        prefix_dir: a folder where beginnings of prompts are kept for other runs.
    """

    memory_bytes: int | None = None
    policy: str = NONE
    budget: KvBudget | None = None
    shared_tokens: int = 0
    prefix_dir: str | None = None

    @classmethod
    def parse(
        cls,
        memory: str | int | None = None,
        policy: str = NONE,
        budget: str | float | None = None,
        shared_tokens: int = 0,
        prefix_dir: str | Path | None = None,
    ) -> "KvOptions":
        """Read sizes as users write them: `memory="2GiB"`, `budget="25%"`. Raises ConfigError for what cannot be read."""
        return cls(
            parse_bytes(memory, "kv_memory"),
            policy,
            None if budget is None else KvBudget.parse(budget),
            shared_tokens,
            None if prefix_dir is None else str(prefix_dir),
        )

    def __post_init__(self) -> None:
        if self.policy not in METHODS:
            raise ConfigError(f"kv_policy={self.policy!r} is not known; give one of {', '.join(METHODS)}")
        if self.budget is not None and not self.method.takes_budget:
            raise ConfigError(
                f"kv_budget={self.budget} was given, and kv_policy={self.policy!r} reads everything: leave the budget out, or "
                f"give kv_policy={' or '.join(repr(name) for name, method in METHODS.items() if method.takes_budget)}"
            )

    @property
    def asks_pages(self) -> bool:
        """Keys and values are to be kept otherwise than all of them on the device."""
        return self.is_lossy or self.memory_bytes is not None or self.shared_tokens > 0

    @property
    def method(self) -> Method:
        return METHODS[self.policy]

    @property
    def index_share(self) -> float:
        """The share of all bytes that a policy holds on the device to choose by."""
        return self.method.index_share

    @property
    def is_lossy(self) -> bool:
        return self.policy != NONE

    def tokens_a_page(self, total_tokens: int) -> int | None:
        """Tokens of each sequence in a page, of `total_tokens` in all; None for what suits the memory."""
        return None if self.method.page_tokens is None else self.method.page_tokens(total_tokens)

    @property
    def level(self) -> str:
        """`lossy`, and by what; nothing where it is not."""
        if not self.is_lossy:
            return ""
        return f"lossy: KV cache {self.policy}" + (f", queries see {self.seen}" if self.seen else "")

    @property
    def seen(self) -> str:
        """What a query sees, of the methods that choose."""
        return str(self._budget) if self.method.takes_budget else ""

    @property
    def _budget(self) -> KvBudget:
        return self.budget or _DEFAULT_BUDGET

    def layer_policy(self) -> Callable[[], LayerPolicy]:
        """Makes what one layer remembers."""
        policy = self.method.policy
        return FullAttention if policy is None else partial(policy, self._budget)

    def stored_percent(self, element_bytes: int) -> int:
        """Percent of a token's bytes in the model's dtype that it takes in a full page."""
        codec = self.method.codec
        return 100 if codec is None else codec.percent(element_bytes)


PLAIN = KvOptions()
