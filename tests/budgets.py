"""Budgets with which none, some or all blocks of a model are resident."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from offload import BudgetTooSmall, Session, offload
from offload.scheduler.model_spec import ModelSpec, Workload
from offload.scheduler.planner import least_budget_bytes
from offload.storage.devices.resolve import resolve_device

NONE, SOME, ALL, SPLIT = "none", "some", "all", "split"
PLENTY = 1 << 30


def spec_of(target: Any, **reserve: int) -> ModelSpec:
    """What the planner is told of a model or a checkpoint folder; of temporaries, for the reservation in `reserve`."""
    with offload(target, device="cpu", cpu_memory=PLENTY, **reserve) as session:
        return session._parts.residency.spec


def budget_for(spec: ModelSpec, residency: str, batch_size: int, max_tokens: int, device: str = "cpu") -> int:
    """Bytes; `split` is too small for the largest block as a whole."""
    spec = replace(spec, workspace_bytes=resolve_device(device).workspace_bytes)
    workload = Workload(batch_size, max_tokens, max_tokens)
    least = least_budget_bytes(spec, workload)
    everything = spec.resident_bytes + workload.kv_bytes(spec) + workload.activation_bytes(spec)
    return {NONE: least, SOME: (least + everything) // 2, ALL: everything, SPLIT: least - 1}[residency]


def training_budget_for(spec: ModelSpec, residency: str, batch_size: int, max_tokens: int) -> int:
    """The same, with what the layers of a tiny model keep for backward: their inputs, 32 wide, in fp32."""
    return budget_for(spec, residency, batch_size, max_tokens) + len(spec.layers) * batch_size * max_tokens * 32 * 4


@contextmanager
def enter(target: Any, budget_bytes: int, **options: Any) -> Iterator[Session]:
    """A session on the CPU in `budget_bytes`, or in what the refusal says is least.

    Before a model is loaded, tensors that must be converted can only be estimated, at some pages too much.
    """
    try:
        session = offload(target, device="cpu", cpu_memory=budget_bytes, **options).__enter__()
    except BudgetTooSmall as error:
        session = offload(target, device="cpu", cpu_memory=error.least_bytes, **options).__enter__()
    try:
        yield session
    finally:
        session.__exit__(None, None, None)
