"""Whether a missing expert is brought to the device or computed where it lies: from measured rates. Pure."""

from dataclasses import dataclass

from offload.scheduler.hardware import HardwareProfile
from offload.scheduler.model_spec import expected_distinct_experts

_MOST_TOKENS = 4096
_NEARLY_ALL = 0.95


@dataclass(frozen=True, slots=True)
class MissRule:
    """What becomes of experts that are not in device memory and lie in CPU memory.

    Attributes:
        most_tokens: an expert with at most so many rows is computed by the CPU; 0 where bringing it is always faster.
        loaded_share: of those, the part that is brought all the same, so that the link and the CPU are through together.
    """

    most_tokens: int = 0
    loaded_share: float = 0.0

    def loads(self, misses: int) -> int:
        """How many of so many misses of one pass through a layer are brought."""
        return int(misses * self.loaded_share)


ALWAYS_LOAD = MissRule()
UNMEASURED = MissRule(most_tokens=8)
"""Where no profile tells: a CPU of 200 GFLOP/s beside a link of 25 GB/s."""


def asks_for_nearly_all(rows: int, count: int, chosen: int) -> bool:
    """Whether a pass of so many tokens asks a layer for nearly all of its experts, as a long prompt does.

    Args:
        count: experts of a layer.
        chosen: of them, for each token.
    """
    return expected_distinct_experts(rows, count, chosen) >= _NEARLY_ALL * count


def miss_rule(hardware: HardwareProfile, expert_bytes: int, element_bytes: int, dtype: str) -> MissRule:
    """The rule for experts of so many bytes.

    The CPU reads an expert's weights once and computes a product for each row; the link moves them once, and both take
    from the same memory (break-even: CPU FLOP/s over link bytes/s; ktransformers, SOSP'25; Fiddler, arXiv 2402.07033).
    """
    if hardware.h2d is None or hardware.d2h is None:
        return ALWAYS_LOAD
    load_seconds = hardware.h2d.seconds(expert_bytes)
    hops = hardware.h2d.latency_seconds + hardware.d2h.latency_seconds

    def cpu_seconds(tokens: int) -> float:
        flops = 2.0 * expert_bytes / element_bytes * tokens
        at_least = expert_bytes / hardware.host.memory_bytes_per_second
        return hops + max(at_least, hardware.host.matrix_seconds(flops, tokens, dtype))

    most, tokens = 0, 1
    while tokens <= _MOST_TOKENS and cpu_seconds(tokens) < load_seconds:
        most, tokens = tokens, tokens * 2
    low, high = most, min(most * 2, _MOST_TOKENS)
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if cpu_seconds(middle) < load_seconds else (low, middle)
    return MissRule(low, cpu_seconds(1) / (cpu_seconds(1) + load_seconds)) if low else ALWAYS_LOAD
