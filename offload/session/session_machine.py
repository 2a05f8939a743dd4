"""What a session runs on, and within which budgets."""

from contextlib import ExitStack

from offload.budgets import Budgets, resolve_budgets
from offload.config import Progress
from offload.runtime.machine import Machine, machine_of
from offload.session.request import Request


def session_budgets(request: Request, held_bytes: int) -> Budgets:
    """The budgets that were asked for, or what is free.

    Args:
        held_bytes: weights of a model that the user holds, which the session moves.

    Raises:
        BudgetTooSmall: if less is free.
    """
    if request.machine is not None:
        return request.machine.free_budgets(request.gpu_memory, request.cpu_memory)
    return resolve_budgets(request.device, request.gpu_memory, request.cpu_memory, held_bytes).check_free(request.device)


def session_machine(
    request: Request, budgets: Budgets, progress: Progress, stack: ExitStack, sample: str | None = None
) -> Machine:
    """The machine that was given, or a new one, as the session has it.

    Args:
        stack: closes a new one.
        sample: a file that will be read.
    """
    machine = request.machine
    if machine is None:
        machine = stack.enter_context(machine_of(request.device, budgets, request.disk_dir, sample, progress))
    return machine.for_session(budgets, request.disk_dir or machine.host.disk_dir, progress)
