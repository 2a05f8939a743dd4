"""The version of a report's keys, and how older ones read."""

from collections.abc import Mapping
from typing import Any

SCHEMA = 2

RENAMED: dict[str, dict[str, str]] = {
    "": {"outside": "standalone"},
    "blocks": {"gathered_by_row": "row_fetched", "divided": "cpu_gpu_split"},
    "parts": {"host_percent": "cpu_percent"},
    "kv": {"brought_bytes": "onloaded_bytes", "sealed_pages": "full_pages", "kept_raw_pages": "unquantized_pages"},
    "prefill": {"own_seconds": "overhead_seconds"},
    "decode": {"own_seconds": "overhead_seconds"},
    "backward": {"own_seconds": "overhead_seconds"},
    "standalone": {"own_seconds": "overhead_seconds"},
    "experts": {"compared": "belady", "recall_twice": "recall_at_2k"},
    "experts.belady": {"hits": "measured_hits", "best_hits": "hits"},
    "training": {"evaluated": "eval_losses", "outlook": "estimate"},
    "training.estimate": {"kept_bytes": "activation_bytes", "kept_on": "activation_tier"},
}
"""Keys of schema 1 that have another name now, by the section they are in."""


def upgraded(content: Mapping[str, Any]) -> dict[str, Any]:
    """Give a report of any schema the keys of this one.

    Raises:
        ValueError: for a schema that is newer than this version of offload.
    """
    schema = content.get("schema", 1)
    if schema == 1:
        return _renamed(content, "") | {"schema": SCHEMA}
    if schema != SCHEMA:
        raise ValueError(f"the report has schema {schema}, and this version of offload reads schemas 1 to {SCHEMA}")
    return dict(content)


def _renamed(content: Mapping[str, Any], section: str) -> dict[str, Any]:
    names = RENAMED.get(section, {})
    result = {}
    for old, value in content.items():
        name = names.get(old, old)
        inner = f"{section}.{name}".strip(".")
        result[name] = _renamed(value, inner) if isinstance(value, Mapping) and inner in _SECTIONS else value
    return result


_SECTIONS = {name for name in RENAMED if name} | {name.partition(".")[0] for name in RENAMED if name}
