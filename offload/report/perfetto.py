"""A trace in the JSON that ui.perfetto.dev and chrome://tracing open: one track a resource, a counter a tier."""

import json
from typing import Any

from offload.scheduler.trace import Trace

_PROCESS = 1


def as_perfetto(trace: Trace) -> str:
    """Times in microseconds, after Google's Trace Event Format."""
    tracks = {name: index for index, name in enumerate(trace.resources(), 1)}
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": _PROCESS, "args": {"name": f"offload ({trace.source})"}}
    ]
    for name, index in tracks.items():
        events.append({"ph": "M", "name": "thread_name", "pid": _PROCESS, "tid": index, "args": {"name": name}})
        events.append({"ph": "M", "name": "thread_sort_index", "pid": _PROCESS, "tid": index, "args": {"sort_index": index}})
    for span in trace.spans:
        event = {"ph": "X", "name": span.name or span.resource, "pid": _PROCESS, "tid": tracks[span.resource]}
        event |= {"ts": span.begin_seconds * 1e6, "dur": span.seconds * 1e6}
        if span.nbytes:
            event["args"] = {"bytes": span.nbytes, "GB/s": round(span.nbytes / max(span.seconds, 1e-9) / 1e9, 3)}
        events.append(event)
    held: dict[str, dict[str, int]] = {}
    for sample in trace.memory:
        held.setdefault(sample.tier, {})[sample.category] = sample.nbytes
        name, now = f"{sample.tier} memory", dict(held[sample.tier])
        events.append({"ph": "C", "name": name, "pid": _PROCESS, "ts": sample.seconds * 1e6, "args": now})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
