"""Into what a workload can be taken apart, where its temporaries are too many at once: micro-batches, chunks of the prompt.

Both are of level *rounding*: products of other shapes are rounded otherwise.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import nn

from offload.model.caches import keeps_cache
from offload.model.text_generation import can_generate
from offload.planning.dry_run import DryRun
from offload.planning.operations import DryRunFailed
from offload.scheduler.model_spec import Workload
from offload.scheduler.plan import Plan
from offload.storage.errors import PlanError

_LEAST_MICRO_BATCH = 2
LEAST_CHUNK = 64
"""A chunk of fewer tokens costs a pass over the weights and computes next to nothing."""


def ways_to_split(model: nn.Module, workload: Workload) -> list[Workload]:
    """The ways to take `workload` apart that `model` can be run in, the whole not counted; the larger parts first."""
    in_batches = _in_micro_batches(model)
    in_chunks = _generates(model) and _in_chunks(model)
    batches = list(_halves(workload.batch_size, _LEAST_MICRO_BATCH)) if in_batches else []
    chunks = list(_halves(workload.pass_tokens, LEAST_CHUNK)) if in_chunks else []
    least = batches[-1:] or [0]
    return [
        *(replace(workload, micro_batch=size) for size in batches),
        *(replace(workload, prefill_chunk=size) for size in chunks),
        *(replace(workload, micro_batch=least[0], prefill_chunk=size) for size in chunks if least[0]),
    ]


def check_parts(model: nn.Module, plan: Plan) -> None:
    """Raise PlanError where the plan takes apart what cannot be."""
    if plan.splits.micro_batch and (plan.splits.micro_batch < _LEAST_MICRO_BATCH or not _in_micro_batches(model)):
        raise PlanError(
            f"micro_batch in the plan is {plan.splits.micro_batch}, and the layers of {type(model).__name__} cannot be "
            f"computed so; it is 0, or at least {_LEAST_MICRO_BATCH} where the model's code shows which dimension is the batch"
        )
    if plan.splits.prefill_chunk and not (_generates(model) and _in_chunks(model)):
        raise PlanError(
            f"prefill_chunk in the plan is {plan.splits.prefill_chunk}, and {type(model).__name__} does not read a "
            "prompt in chunks"
        )


def _halves(count: int, least: int) -> Iterator[int]:
    while (count := -(-count // 2)) >= least:
        yield count
        if count == least:
            return


def _in_micro_batches(model: nn.Module) -> bool:
    """Tried, with a cache that two passes fill. No two of the sizes are equal: they show which dimension is the batch."""
    return _runs(lambda: DryRun(model, micro_batch=2).continued(5, 2, 7))


def _in_chunks(model: nn.Module) -> bool:
    """`generate` must make the cache, and the model take up all of it."""
    makes_cache: Callable[[], bool] = getattr(model, "_supports_default_dynamic_cache", lambda: True)
    if not makes_cache() or "past_key_values" not in inspect.signature(model.forward).parameters or not keeps_cache(model):
        return False
    return _runs(lambda: DryRun(model).reads_its_cache())


def _runs(attempt: Callable[[], object]) -> bool:
    """What the attempt returns counts as yes unless it is False."""
    try:
        return attempt() is not False
    except DryRunFailed:
        return False


def _generates(model: nn.Module) -> bool:
    return can_generate(model) and getattr(model, "generation_config", None) is not None
