"""How much of a context a lossy policy keeps in sight."""

import re
from dataclasses import dataclass

from offload.storage.errors import ConfigError


@dataclass(frozen=True, slots=True)
class KvBudget:
    """Tokens that a query sees: a share of those so far, or a number of them.

    Attributes:
        share: from 0 to 1; 0 where `tokens` counts.
        tokens: of each sequence.
    """

    share: float = 0.0
    tokens: int = 0

    @classmethod
    def parse(cls, text: "str | float | int") -> "KvBudget":
        """`0.25` and `25%` are shares, `2048` is a number of tokens.

        Raises:
            ConfigError: if it is neither.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", str(text))
        if match is not None:
            number = float(match[1]) / (100 if match[2] else 1)
            if match[2] or "." in match[1]:
                if 0 < number <= 1:
                    return cls(share=number)
            elif number >= 1:
                return cls(tokens=int(number))
        raise ConfigError(
            f"kv_budget={text!r} is neither a share of the context (like 0.25 or 25%, more than 0 and at most 100%) nor a "
            "number of tokens (like 2048)"
        )

    def of(self, length: int) -> int:
        """Tokens that are seen of so many."""
        return max(1, int(self.share * length)) if self.share else min(self.tokens, length)

    def __str__(self) -> str:
        return f"{100 * self.share:g}% of the context" if self.share else f"{self.tokens} tokens"
