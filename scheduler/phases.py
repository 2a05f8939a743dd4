"""The phases of a run, and what is added up over each."""

from collections import defaultdict
from dataclasses import dataclass, field

PREFILL = "prefill"
DECODE = "decode"
BACKWARD = "backward"
STANDALONE = "standalone"
"""Blocks called by themselves, not through the model: an encoder that `generate` runs first."""


@dataclass(slots=True)
class PhaseTimes:
    """Sums over the passes of one phase.

    Attributes:
        tokens: processed in prefill; in decode, the steps forward of one sequence.
        batch_size, pass_tokens: the shape of the first prompt, all its chunks together.
        context_tokens: summed over the passes: positions that the KV cache held.
        first_seconds: of the first pass; in prefill, of the first prompt.
        compute_seconds: inside modules, after the waiting.
        overhead_seconds: the runtime's: asking for blocks, binding and releasing them.
        wait_seconds: for blocks that had not arrived, by link.
    """

    passes: int = 0
    tokens: int = 0
    batch_size: int = 0
    pass_tokens: int = 0
    context_tokens: int = 0
    first_seconds: float = 0.0
    seconds: float = 0.0
    compute_seconds: float = 0.0
    overhead_seconds: float = 0.0
    wait_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def other_seconds(self) -> float:
        """What is left: the model's code between the blocks."""
        return max(0.0, self.seconds - self.compute_seconds - self.overhead_seconds - sum(self.wait_seconds.values()))
