"""Which models write text after a prompt: others compute, too, but not by `generate`."""

import json
from pathlib import Path
from typing import Any

import transformers

from offload.storage.errors import ConfigError


def can_generate(model: Any) -> bool:
    """Whether transformers' `generate` works on this model, or on models of this class."""
    ask = getattr(model, "can_generate", None)
    return callable(ask) and bool(ask())


def check_writes_text(model: Any, name: str) -> None:
    """Raise ConfigError for a model, or a class, that takes no prompt of text or answers with none."""
    takes = getattr(model, "main_input_name", "input_ids")
    if can_generate(model) and takes == "input_ids":
        return
    kind = model if isinstance(model, type) else type(model)
    why = "does not write text after a prompt" if takes == "input_ids" else f"takes {takes}, not a prompt of text"
    raise ConfigError(
        f"{name} is a {kind.__name__}, which {why}; use it from Python: "
        f"`with offload({name!r}) as session: session.model(**inputs)`"
    )


def class_of(folder: str) -> type | None:
    """The class that the config in a checkpoint's folder names; None where it is none of transformers' own."""
    try:
        names = json.loads(Path(folder, "config.json").read_text()).get("architectures") or [""]
        found = getattr(transformers, str(names[0]), None)
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    return found if isinstance(found, type) else None
