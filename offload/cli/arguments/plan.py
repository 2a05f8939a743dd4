"""The options of `offload plan`."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from offload.choices import ActivationTier, Exactness, Optimizer, StateTier, TrainingMethod
from offload.cli.option import Arguments, Group, argument, option
from offload.cli.options import AsJson, BatchSize, ExpertGroup, KvGroup, LoadingGroup, MemoryGroup


@dataclass(frozen=True)
class WorkGroup(Group):
    """What would be computed."""

    title: ClassVar[str] = "Work"

    prompt_tokens: Annotated[int, option("of each prompt", "N")] = 512
    new_tokens: Annotated[int, option("of each answer", "N")] = 128
    batch_size: BatchSize = 1


@dataclass(frozen=True)
class PlannedLoading(LoadingGroup):
    """How the model would be loaded and computed."""

    exactness: Annotated[Exactness, option("rounding allows other orders of computing")] = "identical"


@dataclass(frozen=True)
class PlannedMemory(MemoryGroup):
    """What may be used of which machine."""

    disk: Annotated[str | None, option("a folder on the disk that weights are read from (default: $TMPDIR)", "DIR")] = None
    hardware: Annotated[
        str | None, option("plan for the machine that this profile describes (default: this one)", "FILE.json")
    ] = None


@dataclass(frozen=True)
class TrainGroup(Group):
    """What a step of fine-tuning would take, of sequences of --prompt-tokens."""

    title: ClassVar[str] = "Training"

    train: Annotated[TrainingMethod | None, option("estimate training: of adapters, or of all weights", "METHOD")] = None
    rank: Annotated[int, option("rank of the adapters", "N")] = 16
    optimizer: Annotated[Optimizer, option("as `finetune` takes it")] = "adamw"
    state_tier: Annotated[StateTier, option("where optimizer state would live")] = "cpu"
    activation_tier: Annotated[ActivationTier, option("where layer inputs would be kept for backward")] = "recompute"
    gradient_accumulation: Annotated[int, option("micro-batches per optimizer step", "N")] = 1


@dataclass(frozen=True)
class PlanOutput(Group):
    """What is printed and written."""

    title: ClassVar[str] = "Output"

    output: Annotated[str | None, option("write the plan there, for `generate --plan`", "FILE.json")] = None
    json: AsJson = False


@dataclass(frozen=True)
class PlanArguments(Arguments):
    """All that `offload plan` can be asked."""

    model: Annotated[str, argument("a folder with a safetensors checkpoint, `demo`, or a hub id (its headers)", "MODEL")]
    work: WorkGroup
    loading: PlannedLoading
    memory: PlannedMemory
    experts: ExpertGroup
    kv: KvGroup
    training: TrainGroup
    output: PlanOutput
