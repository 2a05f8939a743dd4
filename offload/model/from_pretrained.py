"""The keywords of `from_pretrained`: which mean the same here, and what to say instead of the others."""

import copy
import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from offload.model.encoding import AS_IS, KINDS, Encoding
from offload.storage.errors import CheckpointError, ConfigError, foreign_file

HUB = frozenset({"revision", "cache_dir", "token", "local_files_only", "force_download"})
"""Where a hub id's files come from."""

MODEL = frozenset({"attn_implementation", "experts_implementation", "generation_config", "key_mapping", "weights_only"})
"""Handed on to the model as they are."""

_OWN = frozenset({"config", "dtype", "torch_dtype", "trust_remote_code", "code_revision", "subfolder", "variant", "gguf_file"})
_ENCODED = frozenset({"weights", "weights_head"})

TAKEN = HUB | MODEL | _OWN | _ENCODED
"""These do what they do there, but for `_ENCODED`, which are ours."""

_PLACES = "offload decides what lives where; give gpu_memory=, cpu_memory= and disk_dir= instead"
_QUANTISED = "a quantised checkpoint is streamed as it is; of a plain one, weights='int8', 'int4' or 'nf4' encodes the weights"
_ONE_DEVICE = "one device computes here"
_WHOLE = "parameters are views of safetensors files, so that all of them must be there, in the shapes that the config says"
_KERNELS = "modules are streamed as the model's own code has them"
_ADAPTER = "give the adapter's folder as the model, or add it inside of the session: session.model.load_adapter(...)"
_NOT_YOURS = "it is transformers' own, between its functions"

REFUSED: dict[str, str] = {
    "device_map": _PLACES,
    "max_memory": _PLACES,
    "offload_folder": "give disk_dir= instead",
    "offload_state_dict": "nothing is loaded before it is needed; leave it out",
    "offload_buffers": "buffers stay on the device; leave it out",
    "quantization_config": _QUANTISED,
    "load_in_8bit": _QUANTISED,
    "load_in_4bit": _QUANTISED,
    "use_safetensors": "only safetensors can be streamed; leave it out, or give True",
    "from_tf": "only safetensors can be streamed",
    "from_flax": "only safetensors can be streamed",
    "state_dict": "give a folder, or a model that you made with it: offload(model)",
    "ignore_mismatched_sizes": _WHOLE,
    "output_loading_info": "what was not used of the checkpoint is in session.report().fallbacks",
    "return_unused_kwargs": "a session is returned, and unknown keywords are refused",
    "disable_mmap": "parameters are views of mapped files; their bytes are read with O_DIRECT",
    "tp_plan": _ONE_DEVICE,
    "tp_size": _ONE_DEVICE,
    "device_mesh": _ONE_DEVICE,
    "distributed_config": _ONE_DEVICE,
    "adapter_kwargs": _ADAPTER,
    "adapter_name": _ADAPTER,
    "fusion_config": _KERNELS,
    "use_kernels": _KERNELS,
    "kernel_config": _KERNELS,
    "allow_all_kernels": _KERNELS,
    "proxies": "set HTTPS_PROXY in the environment",
    "tqdm_class": "give progress= instead",
    "low_cpu_mem_usage": "weights are always loaded without being read; leave it out",
    "mirror": "set HF_ENDPOINT in the environment",
    "name_or_path": "the model is the first argument",
    "_fast_init": _NOT_YOURS,
    "_commit_hash": "give revision= instead",
    "_from_auto": _NOT_YOURS,
    "_from_pipeline": _NOT_YOURS,
    "_configuration_file": _NOT_YOURS,
    "_adapter_model_path": _NOT_YOURS,
}
"""What to do instead; a value that asks for nothing (None, False) is taken."""

_HARMLESS = {"use_safetensors": (None, True), "low_cpu_mem_usage": (None, False, True)}
"""Values that change nothing, where they are not None and False."""


@dataclass(frozen=True, slots=True)
class LoadingOptions:
    """How a checkpoint is to be loaded.

    Attributes:
        dtype: `auto` for the checkpoint's own, a torch dtype or its name.
        trust_remote_code: run the model code that the checkpoint brings along.
        subfolder: of the folder or the hub's repository, where config and weights are.
        variant: of the weights' file names, like `fp16`.
        gguf_file: the name of a GGUF file in the folder or the hub's repository; the first of several parts.
        weights: how the weights of the layers of a plain checkpoint are encoded; `as-is` for not at all.
        weights_head: the same for the head; None for int8, where the layers are encoded.
        config: instead of the checkpoint's own: a config object, or the path or hub id of one.
        hub, model: by `HUB` and `MODEL`.
        overrides: of the config, by attribute.
        siblings: what else could have been meant by a name that nothing knows.
    """

    dtype: Any = "auto"
    trust_remote_code: bool = False
    code_revision: str | None = None
    subfolder: str = ""
    variant: str | None = None
    gguf_file: str | None = None
    weights: str = AS_IS
    weights_head: str | None = None
    config: Any = None
    hub: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    siblings: frozenset[str] = frozenset()

    @property
    def encoding(self) -> Encoding | None:
        """What is encoded; None if nothing is."""
        head = self.weights_head or (AS_IS if self.weights == AS_IS else "int8")
        return None if self.weights == head == AS_IS else Encoding(self.weights, head)

    @classmethod
    def of(cls, given: Mapping[str, Any], siblings: frozenset[str] = frozenset()) -> "LoadingOptions":
        """From keywords; those that are not known are taken for attributes of the config.

        Args:
            siblings: options beside which they were given.

        Raises:
            ConfigError: for one that cannot be taken; says what to do instead.
        """
        for name in given.keys() & REFUSED.keys():
            if given[name] not in _HARMLESS.get(name, (None, False)):
                raise ConfigError(f"{name}= of from_pretrained cannot be given: {REFUSED[name]}")
        asked = {name: value for name, value in given.items() if value is not None and name not in REFUSED}
        asked.setdefault("dtype", asked.pop("torch_dtype", "auto"))
        asked.pop("torch_dtype", None)
        own = {name: asked.pop(name) for name in TAKEN - HUB - MODEL if name in asked}
        hub = {name: asked.pop(name) for name in HUB if name in asked}
        model = {name: asked.pop(name) for name in MODEL if name in asked}
        for name in _ENCODED & own.keys():
            if own[name] not in (AS_IS, *KINDS):
                raise ConfigError(f"{name}={own[name]!r} is not known; give {', '.join((AS_IS, *KINDS[:-1]))} or {KINDS[-1]}")
        if asked and own.get("config") is not None:
            raise ConfigError(f"config= is given, so that {', '.join(asked)}= must be set in it")
        return cls(**own, hub=hub, model=model, overrides=asked, siblings=siblings)


AS_IT_IS = LoadingOptions()
"""A checkpoint in its own dtype, with its own config."""


def unknown(names: Iterable[str], known: Iterable[str]) -> ConfigError:
    """The error for keywords that nothing here takes, with what was probably meant."""
    known = sorted({*known, *TAKEN})
    said = []
    for name in names:
        near = difflib.get_close_matches(name, known, n=1)
        said.append(f"{name}= (did you mean {near[0]}=?)" if near else f"{name}=")
    return ConfigError(
        f"{', '.join(said)}: no option of offload or of from_pretrained, and nothing that the model's config knows"
    )


def read_config(place: str, options: LoadingOptions) -> Any:
    """The config of a folder or a hub id, as the options change it.

    Raises:
        CheckpointError: if it cannot be read.
        ConfigError: for an override of what it does not know.
    """
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(options.config, PreTrainedConfig):
        return copy.deepcopy(options.config)
    given = options.config if options.config is not None else place
    hub = {} if os.path.isdir(given) else {**options.hub, "subfolder": options.subfolder}
    with foreign_file(f"{given}/config.json cannot be used", CheckpointError):
        config, unused = AutoConfig.from_pretrained(
            given,
            return_unused_kwargs=True,
            trust_remote_code=options.trust_remote_code,
            code_revision=options.code_revision,
            **hub,
            **copy.deepcopy(dict(options.overrides)),
        )
    if left := [name for name in options.overrides if name in unused]:
        raise unknown(left, {*config.to_dict(), *options.siblings})
    return config
