"""The JSON of a plan: nested by subject, with a schema, checked as it is read."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

from offload.scheduler.plan_sections import BlockPlan, ExpertsPlan, KvPlan, SplitsPlan, WeightsPlan
from offload.storage.errors import PlanError

SCHEMA = 2

_ADDED: Mapping[str, Mapping[str, Any]] = {"weights": {"tables_in_host_memory": [], "encoded_bytes": 0}}
"""What plans of this schema may lack, since they were written before there was such a thing, and what it is then."""

_SECTIONS = {"weights": WeightsPlan, "experts": ExpertsPlan, "kv": KvPlan, "splits": SplitsPlan}

SCHEMA_1 = {
    "weights": {
        "gathered": "row_fetched",
        "divided": "cpu_gpu_split",
        "host_percent": "cpu_percent",
        "pinned_bytes": "always_resident_bytes",
    }
    | {
        name: name
        for name in (
            *("resident", "streamed", "in_host_memory", "computed_on_host"),
            *("slot_bytes", "slot_count", "staging_count", "resident_bytes", "streamed_bytes"),
        )
    },
    "experts": {
        "expert_slots": "slots",
        "expert_slot_bytes": "slot_bytes",
        "experts_in_host_memory": "in_host_memory",
        "expert_staging_count": "staging_count",
    },
    "kv": {
        "kv_bytes": "reserved_bytes",
        "kv_memory_bytes": "memory_bytes",
        "kv_segments": "segments",
        "kv_host_bytes": "host_bytes",
        "kv_stored_percent": "stored_percent",
        "kv_resident_bytes": "resident_bytes",
        "kv_shelves": "state_offload",
    },
    "splits": {name: name for name in ("micro_batch", "decode_micro_batch", "prefill_chunk")},
}
"""The flat keys of schema 1, by the section that they are in now."""


def sections_from_json(text: str) -> dict[str, Any]:
    """Read the sections of a plan of this schema or of schema 1.

    Raises:
        PlanError: for what is no plan.
    """
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"the plan is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise PlanError("the plan must be a JSON object")
    schema = content.pop("schema", 1)
    if schema == 1:
        content = _nested(content)
    elif schema != SCHEMA:
        raise PlanError(f"the plan has schema {schema!r}, and this version of offload reads schemas 1 to {SCHEMA}")
    _check_names("the plan", content, {"activation_bytes", *_SECTIONS})
    sections: dict[str, Any] = {name: _section(name, section, content[name]) for name, section in _SECTIONS.items()}
    return sections | {"activation_bytes": _value("activation_bytes", int, content["activation_bytes"])}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    known = {"activation_bytes", *(old for names in SCHEMA_1.values() for old in names)}
    _check_names("the plan", flat, known)
    content: dict[str, Any] = {section: {new: flat[old] for old, new in names.items()} for section, names in SCHEMA_1.items()}
    content["weights"]["blocks"] = []
    for name in ("segments", "state_offload"):
        content["kv"][name] = bool(content["kv"][name])
    return content | {"activation_bytes": flat["activation_bytes"]}


def _section(name: str, section: type[Any], content: Any) -> Any:
    if isinstance(content, Mapping):
        content = {**_ADDED.get(name, {}), **content}
    _check_names(f"{name} in the plan", content, {field.name for field in fields(section)})
    return section(**{field.name: _value(f"{name}.{field.name}", field.type, content[field.name]) for field in fields(section)})


def _check_names(where: str, content: Any, known: set[str]) -> None:
    if not isinstance(content, Mapping):
        raise PlanError(f"{where} must be a JSON object, not {content!r}")
    if unknown := sorted(set(content) - known):
        raise PlanError(f"{where} has what is not known to one: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    if missing := sorted(known - set(content)):
        raise PlanError(f"{where} lacks {', '.join(missing)}")


def _value(name: str, kind: Any, value: Any) -> Any:
    if kind is bool:
        if not isinstance(value, bool):
            raise PlanError(f"{name} in the plan must be true or false, not {value!r}")
        return value
    if kind is int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise PlanError(f"{name} in the plan must be a count, not {value!r}")
        return value
    if not isinstance(value, list):
        raise PlanError(f"{name} in the plan must be a list, not {value!r}")
    if get_args(kind)[0] is BlockPlan:
        return tuple(_block(name, item) for item in value)
    if not all(isinstance(key, str) for key in value):
        raise PlanError(f"{name} in the plan must be a list of block names, not {value!r}")
    return tuple(value)


def _block(name: str, content: Any) -> BlockPlan:
    _check_names(f"a block of {name}", content, {field.name for field in fields(BlockPlan)})
    for field in ("key", "codec"):
        if not isinstance(content[field], str):
            raise PlanError(f"{field} of a block in the plan must be a name, not {content[field]!r}")
    seconds = content["decode_seconds"]
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 <= seconds < float("inf"):
        raise PlanError(f"decode_seconds of a block in the plan must be a time, not {seconds!r}")
    sizes = {field: _value(field, int, content[field]) for field in content if field.endswith("_bytes")}
    return BlockPlan(content["key"], codec=content["codec"], decode_seconds=float(seconds), **sizes)
