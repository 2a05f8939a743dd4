"""What plugs into a session: a capability with its memory, its wrappers around modules, and its section of the report."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from torch import nn

from offload.config import IDENTICAL
from offload.model.blocks import Structure, Unit
from offload.runtime.call import Call
from offload.runtime.module_wrappers import OnloadedModule
from offload.runtime.placement import Placement
from offload.scheduler.model_spec import Workload
from offload.scheduler.plan import Plan
from offload.storage.arrival import Arrival
from offload.storage.blocks import BlockKey


class LivePlan(Protocol):
    """What a component may ask of the plan that its session runs by."""

    @property
    def plan(self) -> Plan: ...

    @property
    def placement(self) -> Placement: ...

    @property
    def structure(self) -> Structure: ...

    def adopt_if_changed(self) -> None:
        """Take over modules and parameters that were added or replaced since the last pass."""
        ...

    def make_room(self, nbytes: int) -> None:
        """Give up resident blocks, until so many bytes more fit. Raises BudgetExceeded if that is not enough."""
        ...

    def grow(self, workload: Workload) -> None:
        """Make room for a larger workload. Raises BudgetTooSmall if no plan has it."""
        ...

    def edited_weight(self) -> str | None:
        """The name of a weight that has other values than its file; None if none has."""
        ...


class Component:
    """A capability of one session. Every method may be left as it is.

    The session calls, in this order: `open`, `take_slots`, `attach`; then `before_pass` and `after_pass` for each call of
    the model, and `free_slots` with `take_slots` whenever the plan changes; in the end `free_slots`, and what `open` and
    `attach` pushed on the stack. What a component needs of a plan, a function `demand` of its folder tells before there is one.

    Attributes:
        name: its key in the session, and its section of the report.
        reads_weights: it looks at resident weights before the first pass.
    """

    name = ""
    reads_weights = False

    def open(self, model: nn.Module, stack: ExitStack) -> None:
        """Take memory and open files. What is pushed on `stack` is undone in the end."""

    def take_slots(self, plan: Plan) -> None:
        """Take what the plan gives. Raises BudgetExceeded if it does not fit."""

    def free_slots(self) -> None:
        """Give back what `take_slots` took; nothing of it is on its way afterwards."""

    def attach(self, model: nn.Module, stack: ExitStack) -> None:
        """Wrap modules, inside of the session's own wrappers."""

    def cache_maker(self, model: nn.Module) -> Callable[[], Any] | None:
        """Return what makes the cache of a pass that would leave it to the model; None where the model's own will do."""
        return None

    def wrapper(self, unit: Unit) -> OnloadedModule | None:
        """Return what is to onload a unit around its forward, in place of the plain wrapper; None to leave it."""
        return None

    def extras(self, block: BlockKey, call: Call | None) -> Sequence[Arrival]:
        """Start to bring further bytes that must be there with a block, such as the adapters of a pass.

        Called when the block's own load starts, which may be for a pass to come. What is returned is waited for before the
        block computes, or cancelled with it.

        Args:
            call: the pass that is under way; None between passes.
        """
        return ()

    def check_growth(self) -> None:
        """Raise BudgetExceeded while nothing that the plan gave may be given up."""

    def before_pass(self, call: Call) -> None:
        """Prepare for a pass. Raising ends it before anything is computed."""

    def after_pass(self, call: Call) -> None:
        """Take note of a pass that succeeded; `call.cache` is the cache that it returned."""

    @property
    def excluded(self) -> Sequence[nn.Parameter]:
        """Parameters that the component places, and the session does not."""
        return ()

    @property
    def exactness(self) -> str:
        """The level of exactness that it brings the outputs to."""
        return IDENTICAL

    @property
    def notes(self) -> Sequence[str]:
        """A sentence for everything that is slower than it could be now, and why."""
        return ()

    @property
    def held_bytes(self) -> int:
        """Memory beside the plan that it holds at most, where the device's memory is the host's."""
        return 0

    def usage(self) -> object:
        """Return its section of the report; None for no section."""
        return None
