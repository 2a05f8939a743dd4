"""What a session holds between entering and leaving."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from offload.runtime.component import Component
from offload.runtime.executor import LayerExecutor
from offload.runtime.machine import Machine
from offload.runtime.passes import ModelPass
from offload.session.prepare import PlanInput, Prepared
from offload.session.reporting import Reporter
from offload.session.residency import Residency

C = TypeVar("C", bound=Component)


@dataclass(frozen=True, slots=True)
class Opened:
    """One session's parts.

    Attributes:
        given: what the plan was made for.
        root: wraps the model's forward.
        sources: the files of the checkpoint.
    """

    model: nn.Module
    machine: Machine
    executor: LayerExecutor
    given: PlanInput
    prepared: Prepared
    residency: Residency
    components: Mapping[str, Component]
    root: ModelPass
    reporter: Reporter
    sources: frozenset[str]

    def component(self, kind: type[C]) -> C | None:
        """The component of this kind; None if the session has none."""
        return next((item for item in self.components.values() if isinstance(item, kind)), None)
