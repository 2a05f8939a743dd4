"""Writes a run to a file: a page, or JSON that `offload report` reads."""

import json
from pathlib import Path

from offload.report.html import as_html
from offload.report.record import PAGES, Record

_SPANS_KEPT = 20_000
"""In a file: the beginning of a long run, which is like the rest of it."""


def write_record(record: Record, path: str) -> None:
    """As a page if the name ends in .html, else as JSON."""
    if path.endswith(PAGES):
        Path(path).write_text(as_html(record))
        return
    trace = record.trace.to_dict()
    trace["dropped_spans"] += max(0, len(trace["spans"]) - _SPANS_KEPT)
    trace["spans"] = trace["spans"][:_SPANS_KEPT]
    Path(path).write_text(json.dumps(record.report | {"trace": trace}))
