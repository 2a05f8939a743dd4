"""`offload probe`: what this machine can do."""

import json
from pathlib import Path

from rich.table import Table

from offload.cli.arguments.others import ProbeArguments
from offload.cli.terminal import check_writable, print_table, progress_bar, say
from offload.probe import hardware_profile
from offload.scheduler.hardware import HardwareProfile, LinkRate
from offload.storage.cache_folder import cache_folder
from offload.storage.devices.resolve import resolve_device
from offload.storage.errors import duration, gib


def run(request: ProbeArguments) -> None:
    check_writable(request.output)
    with progress_bar() as show:
        profile = hardware_profile(resolve_device(request.device), request.disk, refresh=request.refresh, progress=show)
    text = json.dumps(profile.to_dict(), indent=1)
    if request.output:
        Path(request.output).write_text(text)
    if request.json:
        print(text)
    else:
        _print(profile)
        say(f"kept in {cache_folder() / f'hardware-{profile.hardware_id}.json'}")


def _print(profile: HardwareProfile) -> None:
    print(f"{profile.description}, measured {profile.measured_at or 'by nobody'}\n")
    links = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("link", "speed", "latency"):
        links.add_column(column)
    named = {
        "disk, reading": profile.disk_read,
        "disk, writing": profile.disk_write,
        "CPU to device, page-locked": profile.h2d,
        "CPU to device, ordinary memory": profile.h2d_pageable,
        "device to CPU": profile.d2h,
    }
    for name, rate in named.items():
        if rate is not None:
            links.add_row(name, _speed(rate), duration(rate.latency_seconds) if rate.latency_seconds else "")
    print_table(links)
    if profile.disk_reads_tried:
        tried = ", ".join(f"{shape} {rate / 1e9:.2f}" for shape, rate in profile.disk_reads_tried.items())
        print(f"requests at once and their size, in GB/s: {tried}")
    for processor in (profile.host, profile.device):
        if processor is None:
            continue
        print(
            f"\n{processor.name}: {gib(processor.memory_bytes)}, memory {processor.memory_bytes_per_second / 1e9:.1f} GB/s, "
            f"an operation {duration(processor.operation_seconds)}"
        )
        rates = Table(box=None, pad_edge=False, header_style="bold")
        rates.add_column("GFLOP/s at rows")
        points = next(iter(processor.matrix_rates.values()))
        for point in points:
            rates.add_column(str(point.rows), justify="right")
        for dtype, row in processor.matrix_rates.items():
            rates.add_row(dtype, *(f"{point.flops_per_second / 1e9:,.1f}" for point in row))
        print_table(rates)


def _speed(rate: LinkRate) -> str:
    return f"{rate.bytes_per_second / 1e9:.2f} GB/s"
