"""Runs on the pretended card's own clock."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

LINK = 1e8
"""Bytes a second over the link, both ways, on the pretended clock."""


@contextmanager
def speeds(card: Any, memory_bytes_per_second: float) -> Iterator[None]:
    """Kernels take as long as their bytes; copies cross the link one after another; the host takes no time at all."""
    card.set_speeds(0.0, memory_bytes_per_second, LINK, LINK, 0.0)
    try:
        yield
    finally:
        card.set_speeds(0.0, 0.0, 0.0, 0.0, 0.0)


def seconds_of(card: Any, step: Callable[[], Any], count: int = 4) -> tuple[float, dict[str, float]]:
    """From begin to end, and what each resource was busy."""
    torch.accelerator.synchronize()
    begun, busy = card.host_seconds(), card.busy_seconds()
    for _ in range(count):
        step()
    torch.accelerator.synchronize()
    return card.host_seconds() - begun, {name: now - busy.get(name, 0.0) for name, now in card.busy_seconds().items()}


def waits_of(card: Any, step: Callable[[], Any]) -> dict[tuple[str, str], int]:
    """What stopped the host, by kind and place."""
    before = card.host_waits()
    step()
    return {key: count - before.get(key, 0) for key, count in card.host_waits().items() if count > before.get(key, 0)}
