"""What a machine can do: capacities, bandwidths, latencies and rates, each measured on it (or described by hand)."""

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from offload.storage.errors import ProfileError

PROFILE_FORMAT = 1

_OLD_NAMES = {"window_seconds": "module_seconds"}
"""Field names in profiles that earlier versions made."""


@dataclass(frozen=True, slots=True)
class LinkRate:
    """A way for bytes.

    Attributes:
        bytes_per_second: of large transfers.
        latency_seconds: that each transfer takes, however small.
    """

    bytes_per_second: float
    latency_seconds: float = 0.0

    def seconds(self, nbytes: float) -> float:
        return self.latency_seconds + nbytes / self.bytes_per_second


@dataclass(frozen=True, slots=True)
class MatrixRate:
    """Speed of products of `rows` rows with weights that are not in any cache."""

    rows: int
    flops_per_second: float


@dataclass(frozen=True, slots=True)
class Processor:
    """What computes.

    Attributes:
        name: for people.
        memory_bytes: what it has.
        memory_bytes_per_second: reads and writes of what is in no cache.
        operation_seconds: the least that one tensor operation takes, its submission included.
        asynchronous: True if operations are submitted ahead, so that submitting and computing overlap.
        matrix_rates: by dtype, in ascending order of rows; between two points the time is interpolated.
        workspace_bytes: what its libraries keep of its memory, once they were used.
    """

    name: str
    memory_bytes: int
    memory_bytes_per_second: float
    operation_seconds: float
    asynchronous: bool
    matrix_rates: Mapping[str, tuple[MatrixRate, ...]]
    workspace_bytes: int = 0

    def matrix_seconds(self, flops: float, rows: int, dtype: str) -> float:
        """Time of products with weights, `flops` in all, of `rows` rows each.

        A product of few rows is bound by reading the weights, one of many by arithmetic (the roofline of Williams et
        al., doi:10.1145/1498765.1498785); the measured points trace that curve. A dtype that was not measured counts as
        the slowest one that was.
        """
        if not flops:
            return 0.0
        points = self.matrix_rates.get(dtype)
        if points is None:
            points = min(self.matrix_rates.values(), key=lambda rates: rates[0].flops_per_second)
        return flops / rows * _seconds_per_row_flop(points, rows)


def _seconds_per_row_flop(points: tuple[MatrixRate, ...], rows: int) -> float:
    """Seconds that a product takes for each FLOP of one of its rows: constant where memory bounds it, then linear."""

    def at(point: MatrixRate) -> float:
        return point.rows / point.flops_per_second

    place = bisect_left([point.rows for point in points], rows)
    if place == 0:
        return at(points[0])
    if place == len(points):
        return at(points[-1]) * rows / points[-1].rows
    low, high = points[place - 1], points[place]
    share = (rows - low.rows) / (high.rows - low.rows)
    return at(low) + share * (at(high) - at(low))


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """One machine.

    Attributes:
        hardware_id: names the hardware that was measured: a profile of another one is stale.
        description: for people.
        measured_at: ISO time; empty if it was not measured but described.
        host: the CPU and its memory.
        device: the GPU; None where the CPU computes.
        disk_read, disk_write: the disk that weights are on.
        h2d, d2h: host memory to device and back, page-locked; None without a device.
        h2d_pageable: the same from ordinary memory.
        module_seconds: what the runtime itself takes around the forward of a streamed module: open, bind, unbind, close.
        disk_reads_tried: bytes a second by requests at once and their size, of which `disk_read` is the best.
        compute_beside_reads, reads_beside_compute: where the CPU computes, the share of the rate alone that is left to each
            while both go on, since they share the processor and its memory.
    """

    hardware_id: str
    description: str
    measured_at: str
    host: Processor
    disk_read: LinkRate
    disk_write: LinkRate
    device: Processor | None = None
    h2d: LinkRate | None = None
    d2h: LinkRate | None = None
    h2d_pageable: LinkRate | None = None
    module_seconds: float = 0.0
    disk_reads_tried: Mapping[str, float] = field(default_factory=dict)
    compute_beside_reads: float = 1.0
    reads_beside_compute: float = 1.0

    def __post_init__(self) -> None:
        if (self.device is None) != (self.h2d is None) or (self.device is None) != (self.d2h is None):
            raise ProfileError("a hardware profile has either all of device, h2d and d2h, or none of them")

    @property
    def computes_on(self) -> Processor:
        return self.host if self.device is None else self.device

    def to_dict(self) -> dict[str, Any]:
        content: dict[str, Any] = _plain(self)
        return {"format": PROFILE_FORMAT} | content

    @classmethod
    def from_dict(cls, content: Any) -> "HardwareProfile":
        """Raises ProfileError, which names what is wrong."""
        if not isinstance(content, dict) or content.get("format") != PROFILE_FORMAT:
            raise ProfileError(f'the hardware profile has no "format": {PROFILE_FORMAT}; make a new one with `offload probe`')
        given = {_OLD_NAMES.get(name, name): value for name, value in content.items() if name != "format"}
        values = _checked(cls, given, "")
        for name in ("host", "device"):
            values[name] = None if values.get(name) is None else _processor(values[name], name)
        _positive(values.get("module_seconds", 0.0), "module_seconds", zero=True)
        for name in ("compute_beside_reads", "reads_beside_compute"):
            _positive(values.get(name, 1.0), name)
            if values.get(name, 1.0) > 1:
                raise ProfileError(f"{name} is a share of a rate, at most 1, not {values[name]!r}")
        tried = values.get("disk_reads_tried", {})
        if not isinstance(tried, dict):
            raise ProfileError(f'disk_reads_tried must be like {{"4 x 8 MiB": 2e9}}, not {tried!r}')
        for name, rate in tried.items():
            _positive(rate, f"disk_reads_tried.{name}")
        for name in ("disk_read", "disk_write", "h2d", "d2h", "h2d_pageable"):
            if values.get(name) is not None:
                values[name] = _numbers(LinkRate, values[name], name)
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> "HardwareProfile":
        """Raises ProfileError, which names the file."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except OSError as error:
            raise ProfileError(f"the hardware profile {path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ProfileError(f"{path}: {error}") from error


def _processor(content: Any, where: str) -> Processor:
    values = _checked(Processor, content, where)
    for name in ("memory_bytes", "memory_bytes_per_second", "operation_seconds"):
        _positive(values[name], f"{where}.{name}")
    _positive(values.get("workspace_bytes", 0), f"{where}.workspace_bytes", zero=True)
    rates = values["matrix_rates"]
    if not isinstance(rates, dict) or not rates or not all(isinstance(points, list) and points for points in rates.values()):
        raise ProfileError(f'{where}.matrix_rates must be like {{"bfloat16": [{{"rows": 1, "flops_per_second": 1e9}}]}}')
    values["matrix_rates"] = {
        dtype: tuple(
            sorted(
                (_numbers(MatrixRate, point, f"{where}.matrix_rates.{dtype}") for point in points), key=lambda point: point.rows
            )
        )
        for dtype, points in rates.items()
    }
    return Processor(**values)


def _numbers(kind: type, content: Any, where: str) -> Any:
    values = _checked(kind, content, where)
    for name, value in values.items():
        _positive(value, f"{where}.{name}", zero=name == "latency_seconds")
    return kind(**values)


def _checked(kind: Any, content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ProfileError(f"{where or 'the hardware profile'} must be an object, not {content!r}")
    known = {item.name: item for item in fields(kind)}
    at = f"{where}." if where else ""
    for name in content:
        if name not in known:
            raise ProfileError(f"{at}{name} is not known to a hardware profile; known: {', '.join(known)}")
    for name, found in known.items():
        if name not in content and found.default is MISSING and found.default_factory is MISSING:
            raise ProfileError(f"{at}{name} is missing")
    return dict(content)


def _positive(value: Any, where: str, zero: bool = False) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not (value > 0 or (zero and value == 0)):
        raise ProfileError(f"{where} must be a number above 0, not {value!r}")
    if value == float("inf"):
        raise ProfileError(f"{where} must be finite")


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
