"""Plans that somebody gave: read from a file, and checked against the model and the budgets."""

from pathlib import Path

from offload.budgets import Budgets
from offload.config import ROUNDING
from offload.scheduler.model_spec import ModelSpec, Workload
from offload.scheduler.plan import Plan
from offload.storage.errors import BudgetTooSmall, PlanError, gib


def load_plan(path: str | Path) -> Plan:
    """Raises PlanError, which names the file."""
    try:
        return Plan.from_json(Path(path).read_text())
    except OSError as error:
        raise PlanError(f"the plan {path} cannot be read: {error.strerror}") from error
    except (PlanError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: {error}") from error


def given_plan(plan: Plan, spec: ModelSpec, workload: Workload, budgets: Budgets, exactness: str) -> Plan:
    """A plan that somebody gave, edited perhaps: checked, and its sums made anew.

    Raises:
        PlanError: if it is for another model, or rounds otherwise than the plain model where that was not asked for.
        BudgetTooSmall: if it takes more than the budget.
    """
    plan.check(spec)
    plan = plan.completed(spec, workload, budgets.host_bytes is not None)
    if plan.rounds and exactness != ROUNDING:
        raise PlanError(
            f"by the plan {' and '.join(plan.rounds)}, whose results are rounded otherwise than the plain model's; "
            "give exactness='rounding' (--exactness rounding) to allow that"
        )
    # Where the CPU is the device, its memory keeps only what is encoded there.
    encoded = {block.key for block in spec.blocks if block.encoded_bytes}
    weights = plan.weights
    in_memory = {*weights.computed_on_host, *weights.cpu_gpu_split, *weights.tables_in_host_memory}
    in_memory |= set(weights.in_host_memory) - encoded
    if in_memory and budgets.host_bytes is None:
        raise PlanError("the plan places layers in CPU memory beside a device, and the device that computes is the CPU")
    if plan.device_bytes > budgets.device_bytes:
        raise BudgetTooSmall(
            f"the plan takes {gib(plan.device_bytes)} of the device, and the budget is {gib(budgets.device_bytes)}; "
            "give a larger budget, or make less of it resident",
            plan.device_bytes,
        )
    return plan
