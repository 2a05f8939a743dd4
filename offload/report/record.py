"""A run in a file: the report and the trace together, to be shown again later."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.report.report import Report
from offload.scheduler.trace import Trace
from offload.storage.errors import ConfigError

PAGES = (".html", ".htm")
"""How the names of files end that are pages; all others are JSON."""


@dataclass(frozen=True, slots=True)
class Record:
    """One run.

    Attributes:
        report: as `Report.to_dict` gives it.
    """

    report: dict[str, Any]
    trace: Trace

    @classmethod
    def of(cls, report: Report, trace: Trace) -> "Record":
        return cls(report.to_dict(), trace)

    @classmethod
    def load(cls, path: str) -> "Record":
        """Raises ConfigError for a file that `write_record` did not write."""
        if path.endswith(PAGES):
            raise ConfigError(f"{path} is a page; give the JSON of the run (`--report FILE.json` writes it)")
        try:
            content = json.loads(Path(path).read_text())
            trace = Trace.from_dict(content.pop("trace"))
            return cls(Report.from_dict(content).to_dict(), trace)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{path} is no run that `generate --report FILE.json` wrote ({error!r})") from error
