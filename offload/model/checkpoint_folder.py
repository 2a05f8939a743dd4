"""The local folder of a model: found, or fetched from the hub, and nothing of the repository but what is needed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from glob import escape
from importlib import resources
from pathlib import Path
from typing import Any

from offload.model.from_pretrained import AS_IT_IS, LoadingOptions, read_config
from offload.model.quantised.gguf_files import SUFFIX, find_gguf, patterns_of
from offload.storage.checkpoint import SINGLE_NAME, index_of, indexed_files, no_safetensors, of_variant
from offload.storage.errors import CheckpointError, ConfigError, foreign_file

DEMO = "demo"

_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken")
"""Config, tokenizer, code: beside the weights, and not in folders below, where other formats and training states are."""

_BELOW = ("*.py", "additional_chat_templates/*.jinja")
_ADAPTER_CONFIG = "adapter_config.json"


def find_folder(name: str, options: LoadingOptions = AS_IT_IS) -> str:
    """The local folder of a model: a folder as it is, `demo` as shipped, a hub id from the hub's cache or the network.

    Raises:
        CheckpointError: if there is no such folder and the hub does not give it, or if it holds no model.
    """
    if name == DEMO:
        return str(resources.files("offload") / "demo")
    return _whole(name, _folder(name, options), options)


def find_model(name: str, options: LoadingOptions = AS_IT_IS) -> tuple[str, str | None]:
    """The folder of a model and that of an adapter, if `name` is one: then the model is the one that it was made for.

    Raises:
        CheckpointError: as `find_folder` does.
    """
    if name == DEMO:
        return find_folder(name, options), None
    folder = _folder(name, options)
    if Path(folder, "config.json").exists() or not Path(folder, _ADAPTER_CONFIG).is_file():
        return _whole(name, folder, options), None
    if not os.path.isdir(name):
        _fetch(name, options, ["adapter_model*"])
    base, revision = _base_of(folder)
    hub = {key: value for key, value in options.hub.items() if key != "revision"}
    if revision is not None and not os.path.isdir(base):
        hub["revision"] = revision
    try:
        return find_folder(base, replace(options, subfolder="", hub=hub)), folder
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} holds an adapter of {base!r}, which was not found ({error}): give the model, and this as its adapter"
        ) from error


def _folder(name: str, options: LoadingOptions) -> str:
    """The folder; of the hub, with the small files in it."""
    inside = os.path.join(name, options.subfolder) if options.subfolder else name
    if (gguf := find_gguf(inside, options.gguf_file)) is not None:
        return gguf
    if os.path.isdir(name):
        if (revision := options.hub.get("revision")) is not None:
            raise ConfigError(f"revision {revision} was asked for, and {name} is a folder: only the hub has revisions")
        folder = os.path.join(name, options.subfolder) if options.subfolder else name
        _check_regular(folder)
        return folder
    if name.endswith(SUFFIX) and not os.path.exists(name):
        raise CheckpointError(f"the file {name} is not there")
    if os.path.exists(name):
        raise CheckpointError(f"{name} is a file; give the folder that holds the checkpoint, with its config.json")
    if options.gguf_file is not None:
        folder = _fetch(name, options, list(patterns_of(options.gguf_file)))
        return find_gguf(folder, options.gguf_file) or folder
    return _fetch(name, options, list(_SMALL_FILES), [_inside("*/*", options)])


def _whole(name: str, folder: str, options: LoadingOptions) -> str:
    """The folder, with the weights of its model."""
    if folder.endswith(SUFFIX):
        return folder
    if not Path(folder, "config.json").exists():
        raise CheckpointError(_what_it_is(Path(folder), name))
    if not os.path.isdir(name):
        _fetch_weights(name, folder, options)
    return folder


def _fetch_weights(name: str, folder: str, options: LoadingOptions) -> None:
    """Fetch the files that the index names: a repository may hold the weights in other formats and precisions too."""
    if options.overrides:
        # A typo is answered before anything large is fetched.
        read_config(folder, options)
    single = of_variant(SINGLE_NAME, options.variant)
    _fetch(name, options, [single, *_BELOW])
    if Path(folder, single).exists():
        return
    index = index_of(folder, options.variant)
    if not index.exists():
        raise no_safetensors(name, _files_of(name, options), single, index.name)
    _fetch(name, options, [escape(file) for file in indexed_files(index)])


def _fetch(name: str, options: LoadingOptions, allowed: list[str], ignored: list[str] | None = None) -> str:
    from huggingface_hub import snapshot_download

    patterns = [_inside(pattern, options) for pattern in allowed]
    with _from_hub(name):
        folder = snapshot_download(name, allow_patterns=patterns, ignore_patterns=ignored, **options.hub)
    return os.path.join(folder, options.subfolder) if options.subfolder else str(folder)


def _inside(pattern: str, options: LoadingOptions) -> str:
    return f"{escape(options.subfolder)}/{pattern}" if options.subfolder else pattern


def _files_of(name: str, options: LoadingOptions) -> list[str]:
    """What the repository has beside the weights' place; nothing where the hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        files = HfApi(token=options.hub.get("token")).list_repo_files(name, revision=options.hub.get("revision"))
    except Exception:
        return []
    prefix = f"{options.subfolder}/" if options.subfolder else ""
    names = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
    return sorted(name for name in names if "/" not in name)


@contextmanager
def _from_hub(name: str) -> Iterator[None]:
    """Turn whatever the hub's client raises into a CheckpointError."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise CheckpointError(f"there is no folder {name!r}, and it is no hub id either") from error
    except Exception as error:
        raise CheckpointError(
            f"there is no folder {name!r}, and the hub did not give a model of that name: {str(error).splitlines()[0]} "
            f"(`{DEMO}` is a small model that comes with offload)"
        ) from error


def fetch_headers(name: str) -> tuple[str, dict[str, str]]:
    """The folder with the config of a hub id, and the dtypes of its tensors by name; the weights stay there.

    Raises:
        CheckpointError: if the hub does not give them.
    """
    from huggingface_hub import get_safetensors_metadata, snapshot_download

    with _from_hub(name):
        folder = snapshot_download(name, allow_patterns=["config.json", _ADAPTER_CONFIG, "*.py"])
    if not Path(folder, "config.json").exists():
        raise CheckpointError(_what_it_is(Path(folder), name))
    with _from_hub(name):
        files = get_safetensors_metadata(name).files_metadata
    return folder, {tensor: info.dtype for file in files.values() for tensor, info in file.tensors.items()}


def _base_of(folder: str) -> tuple[str, str | None]:
    """Which model an adapter was made for, and its revision."""
    path = Path(folder, _ADAPTER_CONFIG)
    with foreign_file(f"{path} cannot be used", CheckpointError):
        content: dict[str, Any] = json.loads(path.read_text())
        base, revision = content["base_model_name_or_path"], content.get("revision")
        if not isinstance(base, str) or not base or not isinstance(revision, str | None):
            raise ValueError(f"base_model_name_or_path={base!r} names no model")
    return base, revision


def _what_it_is(folder: Path, name: str) -> str:
    """What a folder without config.json holds, and what to do with it."""
    if (folder / _ADAPTER_CONFIG).is_file():
        return f"{name} holds an adapter of {_base_of(str(folder))[0]}: give that model, and {name} as the adapter"
    if (folder / "model_index.json").is_file():
        parts = _parts_of(folder / "model_index.json")
        return f"{name} is a diffusers pipeline: give one of its models ({', '.join(parts)}), like {name}/text_encoder"
    if files := sorted(path.name for path in folder.glob("*.gguf")):
        return f"{name} holds GGUF files ({', '.join(files[:3])}): name one, like gguf_file={files[0]}"
    return f"{name} holds no config.json; give a folder that save_pretrained wrote"


def _parts_of(index: Path) -> list[str]:
    """The models of a diffusers pipeline that transformers can load."""
    with foreign_file(f"{index} cannot be used", CheckpointError):
        items = json.loads(index.read_text()).items()
    models = [name for name, value in items if isinstance(value, list) and value[:1] == ["transformers"]]
    return sorted(name for name in models if "tokenizer" not in name)


def _check_regular(folder: str) -> None:
    """Raise CheckpointError for what would be opened and is no file: a pipe is waited for, for ever."""
    for pattern in (*_SMALL_FILES, "*.safetensors"):
        for path in Path(folder).glob(pattern):
            if path.exists() and not path.is_file():
                kind = "a folder" if path.is_dir() else "a pipe, a socket or a device"
                raise CheckpointError(f"{path} is {kind}, and a checkpoint consists of files")
