"""What was asked of a session."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from offload.config import Progress
from offload.kv.options import KvOptions
from offload.model.from_pretrained import LoadingOptions
from offload.moe.options import ExpertOptions
from offload.runtime.machine import Machine
from offload.scheduler.hardware import HardwareProfile
from offload.scheduler.plan import Plan
from offload.storage.devices.base import Device
from offload.training.options import Training


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked of a session; `offload` says what each means.

    Attributes:
        device: what computes; that of the machine where one was given.
        uses_session_optimizer: the session trains from the first pass on, with an optimizer of its own.
        compiled: what torch.compile made of the target, where the user gave that; None otherwise.
        machine: shared with other sessions; None to open one for this session alone.
    """

    target: nn.Module | str
    device: Device
    gpu_memory: str | int | None
    cpu_memory: str | int | None
    disk_dir: str | None
    exactness: str
    batch_size: int
    max_tokens: int | None
    new_tokens: int | None
    hardware: HardwareProfile | None
    plan: Plan | None
    training: Training | None
    uses_session_optimizer: bool
    experts: ExpertOptions
    kv: KvOptions
    progress: Progress
    loading: LoadingOptions
    compiled: nn.Module | None = None
    machine: Machine | None = None

    @property
    def can_read_early(self) -> bool:
        """What it keeps resident may be read before the model is known: it was told by an earlier session."""
        return isinstance(self.target, str) and self.machine is None and self.training is None

    @property
    def kept_weights_key(self) -> tuple[Any, ...]:
        """Equal for requests that keep the same weights resident, if the files are the same."""
        asked = self.target, self.cpu_memory, self.exactness, self.batch_size, self.max_tokens, self.new_tokens
        return *asked, self.experts, self.kv, self.loading, None if self.plan is None else self.plan.to_json()
