"""The options of `offload finetune`."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from offload.choices import ActivationTier, MasterDtype, Optimizer, StateTier, TrainingMethod
from offload.cli.option import Arguments, Group, option
from offload.cli.options import LoadingGroup, MemoryGroup, Model


@dataclass(frozen=True)
class DataGroup(Group):
    """What is learned from."""

    title: ClassVar[str] = "Data"

    data: Annotated[
        str,
        option(
            'FILE.jsonl of {"text"}, {"prompt", "completion"} or {"messages"}; a folder of .jsonl and .txt; a hub id', "DATA"
        ),
    ]
    eval_data: Annotated[str | None, option("evaluation data; its loss is reported, it is never trained on", "DATA")] = None
    eval_every: Annotated[int, option("steps from one evaluation to the next; 0 for one at the end", "N")] = 0
    sequence_length: Annotated[
        int, option("most tokens of an example: longer texts are cut into several, longer answers refused", "N")
    ] = 512
    packing: Annotated[bool, option("pack several examples into one sequence, with attention masked between them")] = False
    batch_size: Annotated[int, option("examples in one micro-batch", "N")] = 1


@dataclass(frozen=True)
class AdapterGroup(Group):
    """What is trained."""

    title: ClassVar[str] = "What is trained"

    method: Annotated[TrainingMethod, option("adapters, or all weights")] = "lora"
    rank: Annotated[int, option("rank of the adapters", "N")] = 16
    alpha: Annotated[float, option("the adapters are scaled by A / rank", "A")] = 32.0
    dropout: Annotated[float, option("dropout in front of the adapters", "P")] = 0.0
    target_modules: Annotated[str, option("modules that get adapters, separated by commas", "NAMES")] = "all-linear"


@dataclass(frozen=True)
class OptimizerGroup(Group):
    """How the weights are stepped."""

    title: ClassVar[str] = "Optimizer"

    optimizer: Annotated[Optimizer, option("adamw8bit keeps its moments in 8 bits, so its steps are others")] = "adamw"
    learning_rate: Annotated[float | None, option("(default: 2e-4 for adapters, 1e-5 for all weights)", "R")] = None
    warmup: Annotated[int, option("linear warm-up steps", "N")] = 0
    weight_decay: Annotated[float, option("decay of the weights, by learning rate", "W")] = 0.0
    max_grad_norm: Annotated[float, option("clip the global gradient norm to X", "X")] = 1.0
    gradient_accumulation: Annotated[int, option("micro-batches per optimizer step", "N")] = 1
    epochs: Annotated[int, option("passes over the data", "N")] = 1
    max_steps: Annotated[int, option("stop after N steps; 0 for all", "N")] = 0
    seed: Annotated[int, option("seed for data order, dropout and adapter initialization", "N")] = 0


@dataclass(frozen=True)
class FinetuneMemory(MemoryGroup):
    """What may be used of the machine, and how."""

    disk: Annotated[
        str | None,
        option("keeps weights that must be converted, and states on NVMe (default for these: --output)", "DIR"),
    ] = None
    master_dtype: Annotated[MasterDtype, option("dtype of the master copy of 16-bit weights")] = "float32"
    state_tier: Annotated[StateTier, option("where optimizer state lives")] = "cpu"
    activation_tier: Annotated[ActivationTier, option("where layer inputs are kept for backward")] = "recompute"
    loss_chunk: Annotated[
        int, option("compute the loss N tokens at a time; exactness becomes `rounding`; 0 for all at once", "N")
    ] = 0
    batch_major: Annotated[
        bool,
        option("load the weights once per micro-batch instead of once per step: slower, less memory, the same result"),
    ] = False


@dataclass(frozen=True)
class FinetuneOutput(Group):
    """What is written and printed."""

    title: ClassVar[str] = "Output"

    output: Annotated[str, option("where the adapter or the model is written, and checkpoints", "DIR")]
    save_every: Annotated[int, option("steps from one checkpoint to the next; 0 for none", "N")] = 0
    resume: Annotated[bool, option("go on from the checkpoint in --output, if there is one")] = False
    report: Annotated[str | None, option("write the report there: .html for a page, else JSON", "FILE")] = None
    verbose: Annotated[bool, option("print the whole report, not its three lines")] = False
    quiet: Annotated[bool, option("print neither steps nor the report")] = False


@dataclass(frozen=True)
class FinetuneArguments(Arguments):
    """All that `offload finetune` can be asked."""

    model: Model
    data: DataGroup
    output: FinetuneOutput
    adapter: AdapterGroup
    optimizer: OptimizerGroup
    loading: LoadingGroup
    memory: FinetuneMemory
