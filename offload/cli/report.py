"""`offload report`: a run shown again, or two compared."""

from typing import Any

from rich.table import Table

from offload.cli.arguments.others import ReportArguments
from offload.cli.terminal import check_writable, print_table, say
from offload.report.facts import short_name
from offload.report.record import Record
from offload.report.report import Report
from offload.report.write import write_record
from offload.storage.errors import ConfigError, duration, foreign_file, gib


def run(request: ReportArguments) -> None:
    if len(request.runs) > 2:
        raise ConfigError(f"{len(request.runs)} runs were given; give one, or two to compare")
    records = [Record.load(path) for path in request.runs]
    if len(records) == 2:
        if request.output:
            raise ConfigError("--output is for one run; two are compared in the terminal")
        _compare(request.runs, [record.report for record in records])
    elif request.output:
        check_writable(request.output)
        with foreign_file(f"{request.runs[0]} is no run that can be shown", ConfigError):
            write_record(records[0], request.output)
        say(f"written to {request.output}")
    else:
        with foreign_file(f"{request.runs[0]} is no run that can be shown", ConfigError):
            text = str(Report.from_dict(records[0].report))
        print(text)


def _compare(names: list[str], reports: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", *names, "second / first"):
        table.add_column(column, justify="right" if column else "left")
    for name, path, words in _ABOUT:
        said = [words(_at(report, path)) for report in reports]
        if any(said):
            table.add_row(name, *said, "" if said[0] == said[1] else "differs")
    for name, path, show in _ROWS:
        values = [_at(report, path) for report in reports]
        if any(values):
            ratio = f"{values[1] / values[0]:.2f}" if values[0] and values[1] else ""
            table.add_row(name, *("" if value is None else show(value) for value in values), ratio)
    print_table(table)


def _at(report: dict[str, Any], path: str) -> Any:
    value: Any = report
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _rate(value: float) -> str:
    return f"{value / 1e9:.2f} GB/s"


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _budget(value: Any) -> str:
    return gib(value) if value else ""


_ABOUT = (
    ("model", "model", short_name),
    ("device", "device", _text),
    ("exactness", "exactness", _text),
    ("GPU memory, budget", "tiers.gpu.budget_bytes", _budget),
    ("CPU memory, budget", "tiers.cpu.budget_bytes", _budget),
)
"""What has to be known of two runs before their figures are compared: name, where it is, and as what it is shown."""

_ROWS = (
    ("prefill", "prefill.seconds", duration),
    ("a token", "decode.seconds_per_token", duration),
    ("decode: compute", "decode.compute_seconds", duration),
    ("decode: waiting for disk", "decode.wait_seconds.disk", duration),
    ("decode: waiting for h2d", "decode.wait_seconds.h2d", duration),
    ("decode: offload's own work", "decode.overhead_seconds", duration),
    ("decode: between blocks", "decode.other_seconds", duration),
    ("weights", "weight_bytes", gib),
    ("streamed a pass", "streamed_bytes_per_pass", gib),
    ("disk", "links.disk.bytes_per_second", _rate),
    ("h2d", "links.h2d.bytes_per_second", _rate),
    ("GPU memory, peak", "tiers.gpu.peak_bytes", gib),
    ("CPU memory, peak", "tiers.cpu.peak_bytes", gib),
    ("predicted token", "prediction.seconds_per_token", duration),
)
