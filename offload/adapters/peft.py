"""Adapters (LoRA, arXiv 2106.09685), by peft: added, kept in a folder, folded into the weights."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.adapters.config_types import check_types
from offload.storage.block_file import BlockFileWriter, spill_folder
from offload.storage.errors import ConfigError, foreign_file
from offload.storage.whole_file import PARTIAL


def with_adapters(
    model: nn.Module,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    target_modules: str = "all-linear",
    seed: int = 0,
) -> Any:
    """The model as peft wraps it, with new adapters, which alone are trained.

    Args:
        rank: of the adapters' products.
        alpha: scales them, over the rank.
        target_modules: names separated by commas, or `all-linear`.
        seed: of their initialization.

    Raises:
        ConfigError: if peft finds nothing to adapt.
    """
    peft = _peft()
    modules = target_modules
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=modules if modules == "all-linear" else modules.split(","),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"target_modules={modules} cannot be adapted: {str(error).splitlines()[0]}") from error


def save_adapters(adapted: Any, folder: str | Path) -> None:
    """As peft does: a folder is whole, or not there."""
    with _made_whole(Path(folder)) as partial:
        adapted.save_pretrained(partial, save_embedding_layers=False)


def load_adapters(model: nn.Module, folder: str) -> Any:
    """The model with the adapters of a folder.

    Raises:
        ConfigError: if it holds none, or those of another model.
    """
    peft = _peft()
    if not (Path(folder) / "adapter_config.json").is_file():
        raise ConfigError(f"{folder} holds no adapter: no adapter_config.json; `offload finetune --output DIR` writes one")
    check_types(folder)
    with foreign_file(f"the adapter {folder} cannot be used, or does not fit the model", ConfigError):
        return peft.PeftModel.from_pretrained(model, folder).eval()


def inject_adapters(model: Any, folder: str) -> None:
    """Add the adapters of a folder to the model, as transformers does for one that is loaded by that folder.

    Raises:
        ConfigError: if they are those of another model.
    """
    _peft()
    check_types(folder)
    with foreign_file(f"the adapter {folder} cannot be used, or does not fit the model", ConfigError):
        model.load_adapter(folder)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError('adapters need the package peft: pip install "offload[lora]"') from error
    return peft


def merge(adapted: Any, folder: str | None = None) -> Any:
    """Fold the adapters into the weights, on disk: a weight at a time is in memory.

    Args:
        adapted: as `load_adapters` gives it, of a model that nobody offloads now.
        folder: where the weights that changed are written until they are saved; by default a temporary one.

    Returns:
        The model, without adapters.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    writer = BlockFileWriter(folder or spill_folder())
    changed: dict[str, torch.nn.Parameter] = {}
    try:
        for name, module in adapted.named_modules():
            if isinstance(module, BaseTunerLayer):
                weight = getattr(module.get_base_layer(), getattr(module, "parameter_name", "weight"))
                original = weight.data
                weight.data = original.clone()
                module.merge()
                writer.add(name, weight.data)
                changed[name] = weight
                weight.data = original
        file = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    model = adapted.unload()
    for name, weight in changed.items():
        weight.data = file.view(name)
    file.close()
    return model


def save_model(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """A folder that `from_pretrained` loads: whole, or not there."""
    with _made_whole(Path(folder)) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _readable(file: Path) -> int:
    """The mode that a new file, or folder, has here."""
    mask = os.umask(0)
    os.umask(mask)
    return (0o777 if file.is_dir() else 0o666) & ~mask


@contextmanager
def _made_whole(folder: Path) -> Iterator[str]:
    """A new folder beside `folder`, whose content is put in place at the end; nothing is, where an error ends it."""
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{PARTIAL}")
    partial.mkdir(parents=True)
    try:
        yield str(partial)
        for file in partial.rglob("*"):
            # safetensors writes for the owner alone, whatever the umask says.
            file.chmod(_readable(file))
        if folder.exists():
            for file in partial.iterdir():
                os.replace(file, folder / file.name)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
