"""The options of `offload generate`."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from offload.choices import Exactness, ExpertMisses, ExpertPrefetch
from offload.cli.option import Arguments, Group, option
from offload.cli.options import BatchSize, ExpertGroup, KvGroup, LoadingGroup, MemoryGroup, Model


@dataclass(frozen=True)
class PromptGroup(Group):
    """What is to be continued."""

    title: ClassVar[str] = "Prompt"

    prompt: Annotated[str | None, option("the text to continue; by default standard input", "TEXT")] = None
    prompts: Annotated[
        str | None, option('a prompt a line: "text", {"prompt": "text"} or {"messages": [...]}', "FILE.jsonl")
    ] = None
    chat: Annotated[bool, option("treat each prompt as a message and use the model's chat template")] = False
    system: Annotated[str | None, option("a system message in front of each chat; goes with --chat", "TEXT")] = None
    batch_size: BatchSize = 1

    def __post_init__(self) -> None:
        """Raise ValueError for two sources of prompts."""
        if self.prompt is not None and self.prompts is not None:
            raise ValueError("--prompt and --prompts exclude each other: give one")


@dataclass(frozen=True)
class SamplingGroup(Group):
    """How the next token is chosen."""

    title: ClassVar[str] = "Sampling"

    max_new_tokens: Annotated[int, option("stop after N tokens", "N")] = 128
    stop: Annotated[list[str], option("stop before this text; may be given several times", "TEXT")] = field(
        default_factory=list
    )
    temperature: Annotated[
        float | None,
        option("0 takes the likeliest token, more draws one (default of these: as the model's generation config says)", "T"),
    ] = None
    top_k: Annotated[int | None, option("draw from the K likeliest tokens; 0 for all", "K")] = None
    top_p: Annotated[float | None, option("draw from the likeliest tokens that add up to P", "P")] = None
    min_p: Annotated[float | None, option("draw from tokens at least P times as likely as the likeliest", "P")] = None
    repetition_penalty: Annotated[float | None, option("above 1, what was said already is less likely", "R")] = None
    num_beams: Annotated[int | None, option("search along N beams; 1 for none", "N")] = None
    seed: Annotated[int | None, option("makes draws repeatable", "N")] = None


@dataclass(frozen=True)
class GenerateLoading(LoadingGroup):
    """How the model is loaded and computed."""

    adapter: Annotated[list[str], option("a PEFT adapter for the model, from `offload finetune`", "DIR")] = field(
        default_factory=list
    )
    revision: Annotated[str | None, option("branch, tag or commit, of a hub id", "REV")] = None
    exactness: Annotated[Exactness, option("rounding allows other orders of computing")] = "identical"

    def __post_init__(self) -> None:
        """Raise ValueError for several adapters."""
        if len(self.adapter) > 1:
            raise ValueError(f"--adapter was given {len(self.adapter)} times, and a run uses one: merge the others first")


@dataclass(frozen=True)
class GenerateMemory(MemoryGroup):
    """What may be used of the machine, and how."""

    disk: Annotated[
        str | None,
        option(
            "keeps weights that must be converted, and the KV cache's pages while it runs (default: $TMPDIR, nothing kept)",
            "DIR",
        ),
    ] = None
    plan: Annotated[
        str | None, option("what lives where, from `offload plan --output` (default: planned here)", "FILE.json")
    ] = None


@dataclass(frozen=True)
class GenerateExperts(ExpertGroup):
    """What becomes of single experts, and what is written about them."""

    expert_misses: Annotated[ExpertMisses, option("on an expert-cache miss: load it to the GPU, or compute it on the CPU")] = (
        "auto"
    )
    expert_prefetch: Annotated[
        ExpertPrefetch, option("load experts before they are asked for: in long prompts (auto), in decode too (on)")
    ] = "auto"
    expert_trace: Annotated[
        str | None, option("write which experts each token chose, for `offload experts replay`", "FILE.csv")
    ] = None


@dataclass(frozen=True)
class GenerateKv(KvGroup):
    """How keys and values are kept, in this run and for others."""

    prefix_cache: Annotated[
        str | None,
        option("cache the KV of prompt prefixes in DIR, across runs (created if missing); exactness becomes `rounding`", "DIR"),
    ] = None


@dataclass(frozen=True)
class OutputGroup(Group):
    """What is printed and written."""

    title: ClassVar[str] = "Output"

    report: Annotated[
        str | None, option("write the report there: .html for a page, else JSON that `offload report` reads", "FILE")
    ] = None
    trace: Annotated[str | None, option("write what happened when, for ui.perfetto.dev", "FILE.json")] = None
    live: Annotated[bool, option("show memory, links and stalls in the terminal while it runs")] = False
    verbose: Annotated[bool, option("print the whole report, not its three lines")] = False
    quiet: Annotated[bool, option("do not print the report")] = False
    json: Annotated[bool, option("print one JSON object (completions and report) at the end instead")] = False
    jsonl: Annotated[bool, option("print each completion as a JSON object on a line of its own, as it comes")] = False

    def __post_init__(self) -> None:
        """Raise ValueError for two forms of output."""
        if self.json and self.jsonl:
            raise ValueError("--json and --jsonl exclude each other: give one")


@dataclass(frozen=True)
class GenerateArguments(Arguments):
    """All that `offload generate` can be asked."""

    model: Model
    prompt: PromptGroup
    sampling: SamplingGroup
    loading: GenerateLoading
    memory: GenerateMemory
    experts: GenerateExperts
    kv: GenerateKv
    output: OutputGroup
