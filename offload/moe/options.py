"""What a user may ask of experts."""

from dataclasses import dataclass
from typing import get_args

from offload.choices import ExpertMisses, ExpertPolicy, ExpertPrefetch
from offload.storage.errors import ConfigError

AUTO, IN_LAYERS, LOAD, CPU, ON, OFF = "auto", "layers", "load", "cpu", "on", "off"
POLICIES: tuple[str, ...] = get_args(ExpertPolicy)
MISSES: tuple[str, ...] = get_args(ExpertMisses)
PREFETCH: tuple[str, ...] = get_args(ExpertPrefetch)


@dataclass(frozen=True, slots=True)
class ExpertOptions:
    """What a user may ask of experts.

    Attributes:
        policy: which of them stay in device memory.
        misses: what becomes of those that are not there.
        prefetch: `auto` brings experts of the next layer ahead while a long prompt is computed, which needs them all; `on`
            asks the next layer's router a layer early in decode, too; `off` does neither.
    """

    policy: str = AUTO
    misses: str = AUTO
    prefetch: str = AUTO

    def __post_init__(self) -> None:
        for name, known in (("policy", POLICIES), ("misses", MISSES), ("prefetch", PREFETCH)):
            if getattr(self, name) not in known:
                raise ConfigError(f"expert_{name}={getattr(self, name)!r} is not known; give one of {', '.join(known)}")
