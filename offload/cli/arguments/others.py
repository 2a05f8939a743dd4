"""The options of the commands that have few."""

from dataclasses import dataclass
from typing import Annotated

from offload.choices import Family, SlotScope, SyntheticDtype
from offload.cli.option import Arguments, argument, option, size_option
from offload.cli.options import AsJson, Model


@dataclass(frozen=True)
class MergeArguments(Arguments):
    """All that `offload merge` can be asked."""

    model: Model
    adapter: Annotated[str, option("a PEFT adapter folder, as `offload finetune` writes one", "DIR")]
    output: Annotated[str, option("where the model is written", "DIR")]
    disk: Annotated[str | None, option("holds merged weights meanwhile (default: the system's temporary folder)", "DIR")] = None
    trust_remote_code: Annotated[bool, option("run model code that comes with the checkpoint")] = False


@dataclass(frozen=True)
class ReplayArguments(Arguments):
    """All that `offload experts replay` can be asked."""

    trace: Annotated[str, argument("from `generate --expert-trace`, or another tool that writes the format", "TRACE.csv")]
    budget: Annotated[str | None, size_option("device memory for experts, like 3000MiB")] = None
    slots_per_layer: Annotated[int | None, option("experts in device memory, by layer", "N")] = None
    policy: Annotated[str | None, option("which policies, separated by commas (default: all)", "NAMES")] = None
    scope: Annotated[SlotScope, option("whether layers share their slots")] = "global"
    json: AsJson = False

    def __post_init__(self) -> None:
        """Raise ValueError unless the room is given in one way."""
        if (self.budget is None) == (self.slots_per_layer is None):
            raise ValueError("give one of --budget and --slots-per-layer")


@dataclass(frozen=True)
class ProbeArguments(Arguments):
    """All that `offload probe` can be asked."""

    device: Annotated[str, option("auto, cuda, cuda:N or cpu", "DEVICE")] = "auto"
    disk: Annotated[str | None, option("a folder on the disk that weights are read from (default: $TMPDIR)", "DIR")] = None
    refresh: Annotated[bool, option("measure again, even if a profile is kept")] = False
    output: Annotated[str | None, option("write the profile there too, to plan for this machine elsewhere", "FILE.json")] = None
    json: Annotated[bool, option("print the profile as JSON")] = False


@dataclass(frozen=True)
class BuildArguments(Arguments):
    """All that `offload native build` can be asked."""

    json: Annotated[bool, option("print the speeds as JSON")] = False


@dataclass(frozen=True)
class ReportArguments(Arguments):
    """All that `offload report` can be asked."""

    runs: Annotated[list[str], argument("one run, or two to compare", "RUN.json")]
    output: Annotated[str | None, option("write the run as a page", "FILE.html")] = None


@dataclass(frozen=True)
class SynthArguments(Arguments):
    """All that `offload synth` can be asked."""

    folder: Annotated[str, argument("where; made if need be, and must be empty", "DIR")]
    size: Annotated[str, size_option("of the weights, like 4GiB; met within a few percent")]
    family: Annotated[Family, option("the architecture")] = "llama"
    dtype: Annotated[SyntheticDtype, option("of the weights")] = "bfloat16"
    shard_size: Annotated[str, size_option("of one file")] = "2GiB"
    seed: Annotated[int, option("the same one gives the same bytes", "N")] = 0
