"""The options that several commands share, by group."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from offload.choices import ExpertPolicy, KvPolicy, WeightDtype, WeightEncoding
from offload.cli.option import Group, argument, option, size_option

Model = Annotated[str, argument("a folder with a safetensors checkpoint, a hub id, or `demo`", "MODEL")]
AsJson = Annotated[bool, option("print one JSON object instead of tables")]
BatchSize = Annotated[int, option("prompts that share each pass over the weights", "N")]


@dataclass(frozen=True)
class LoadingGroup(Group):
    """How a checkpoint is loaded."""

    title: ClassVar[str] = "Model"

    dtype: Annotated[WeightDtype, option("dtype of the weights")] = "auto"
    weights: Annotated[
        WeightEncoding, option("encode the weights of a plain checkpoint's layers, once: lossy; with --disk they are kept")
    ] = "as-is"
    weights_head: Annotated[WeightEncoding | None, option("the same for the head (default: int8 where layers are encoded)")] = (
        None
    )
    trust_remote_code: Annotated[bool, option("run model code that comes with the checkpoint")] = False
    gguf_file: Annotated[str | None, option("which GGUF file of the folder or repository, if it has several", "NAME")] = None


@dataclass(frozen=True)
class MemoryGroup(Group):
    """What may be used of the machine."""

    title: ClassVar[str] = "Memory"

    device: Annotated[str, option("auto, cuda, cuda:N or cpu", "DEVICE")] = "auto"
    gpu_memory: Annotated[str | None, size_option("budget on the GPU, like 8GiB (default: what is free, less 10%)")] = None
    cpu_memory: Annotated[
        str | None,
        size_option("budget of CPU memory, like 24GiB; the only one on a CPU (default: what is free, less a margin)"),
    ] = None


@dataclass(frozen=True)
class ExpertGroup(Group):
    """What becomes of single experts."""

    title: ClassVar[str] = "Experts"

    expert_policy: Annotated[
        ExpertPolicy, option("which experts stay in device memory; `layers` streams whole layers instead")
    ] = "auto"


@dataclass(frozen=True)
class KvGroup(Group):
    """How keys and values are kept."""

    title: ClassVar[str] = "KV cache"

    kv_memory: Annotated[
        str | None,
        size_option(
            "device memory for keys and values, like 2GiB; the rest goes down a tier, beside a GPU to CPU memory first "
            "(default: as planned)"
        ),
    ] = None
    kv_policy: Annotated[
        KvPolicy, option("lossy, but for none: int8 or int4 pages, a window of recent tokens, or retrieval")
    ] = "none"
    kv_budget: Annotated[
        str | None,
        option("KV tokens each query attends to, for `window` and `retrieve`: 25% or a number of tokens (default: 25%)", "B"),
    ] = None
