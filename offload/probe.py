"""Measures this machine: a few seconds, once; the profile is kept by hardware id."""

import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psutil
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from offload.config import Progress
from offload.kept_profile import hardware_id, kept_profile
from offload.model.homes import ParameterHome
from offload.planning.dry_run import DryRun
from offload.runtime.block_sources import SlotRegion, packed_offsets
from offload.runtime.clock import PassClock
from offload.runtime.executor import LayerExecutor
from offload.runtime.recorder import Recorder
from offload.runtime.weights import StreamedBlock
from offload.scheduler.hardware import HardwareProfile, LinkRate, MatrixRate, Processor
from offload.scheduler.work import total
from offload.storage.arrival import Waits
from offload.storage.cache_folder import cache_folder
from offload.storage.contention import Contention, measure_contention
from offload.storage.devices.base import Device, Event, copy_bytes_per_second
from offload.storage.devices.cpu import CpuDevice
from offload.storage.errors import ProfileError
from offload.storage.host_buffer import HostBuffer
from offload.storage.io_engines.posix import PosixEngine
from offload.storage.read_speed import ReadSpeed, read_speed, spans
from offload.storage.state_file import StateFile
from offload.storage.transfer import Link
from offload.storage.whole_file import replace_text

_ROWS = (1, 8, 64, 512)
"""Tokens at once: decode, a batch, a short prompt, a long one."""

_MATRIX_EDGE = 2048
_WEIGHTS_BYTES = 192 << 20
"""More than any cache holds."""

_MEMORY_BYTES = 192 << 20
_COPY_BYTES = 64 << 20
_DISK_BYTES = 256 << 20
_READ_ROUNDS = 3
_LEAST_DISK_BYTES = 32 << 20
_WRITE_THREADS = 2
_SMALL_READS = 64
_WRITE_BYTES = 8 << 20
_POINT_SECONDS = 0.2
_WRITE_SECONDS = 1.5
_SMALL_WIDTH = 128
_STEPS = 9
_BESIDE_SECONDS = 0.5
_WINDOWS = 16
_LAYER_PARAMETERS = 9


def hardware_profile(
    device: Device, disk_dir: str | None = None, *, refresh: bool = False, progress: Progress | None = None
) -> HardwareProfile:
    """The profile of this machine: the kept one, or a new one.

    Args:
        device: what computes.
        disk_dir: a folder on the disk that weights are read from; by default the system's temporary folder.
        refresh: measure again.
        progress: told of the steps.

    Raises:
        ProfileError: if the kept profile was broken by hand.
    """
    folder = disk_dir or tempfile.gettempdir()
    kept = None if refresh else kept_profile(device, folder)
    if kept is not None:
        return kept
    profile = measure(device, folder, progress or (lambda what, done, total: None))
    path = cache_folder() / f"hardware-{profile.hardware_id}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(profile.to_dict(), indent=1))
    except OSError:
        # A home that cannot be written: measured again next time.
        pass
    return profile


def measure(device: Device, disk_dir: str, progress: Progress, sample: str | None = None) -> HardwareProfile:
    """Measure everything now.

    Args:
        sample: a large file to read instead of one written for the purpose.
    """
    done = iter(range(1, _STEPS + 1))

    def step() -> None:
        progress("measuring", next(done, _STEPS), _STEPS)

    speed, read, write, contention = _disk(disk_dir, sample, device.shares_host_memory)
    step()
    host = _processor(CpuDevice(), psutil.virtual_memory().total, step)
    card = None
    links: dict[str, LinkRate | None] = {}
    if not device.shares_host_memory:
        card = _processor(device, device.free_bytes(), step)
        links = _copies(device)
    progress("measuring", _STEPS, _STEPS)
    return HardwareProfile(
        hardware_id=hardware_id(device, disk_dir),
        description=f"{host.name}, {torch.get_num_threads()} threads" + (f"; {card.name}" if card else ""),
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        host=host,
        device=card,
        disk_read=read,
        disk_write=write,
        disk_reads_tried={str(shape): rate for shape, rate in speed.tried.items()},
        module_seconds=module_seconds(device),
        compute_beside_reads=contention.compute,
        reads_beside_compute=contention.reads,
        **links,
    )


def _disk(folder: str, sample: str | None, with_compute: bool) -> tuple[ReadSpeed, LinkRate, LinkRate, Contention]:
    """What reads gave in each shape, the rates of reading and of writing, and what products leave of reads."""
    room = psutil.disk_usage(folder).free
    size = min(_DISK_BYTES, room // 4 // _WRITE_BYTES * _WRITE_BYTES)
    if size < _LEAST_DISK_BYTES:
        raise ProfileError(f"{folder} has {room >> 20} MiB free, too little to measure the disk; name another with --disk")
    file = StateFile.new(folder)
    engine = PosixEngine()
    try:
        write = _write_rate(file, size)
        path = sample or file.path
        ranges = spans(path, _DISK_BYTES, engine.unit_bytes)
        speed = read_speed(engine, ranges, rounds=_READ_ROUNDS)
        latency = _read_latency(engine, path)
        contention = Contention(1.0, 1.0)
        if with_compute:
            contention = measure_contention(engine, ranges, speed.shape, _BESIDE_SECONDS, torch.bfloat16)
    finally:
        engine.close()
        file.close()
    return speed, LinkRate(speed.bytes_per_second, latency), write, contention


def _write_rate(file: StateFile, size: int) -> LinkRate:
    """Fill the file as far as the time for it goes, as states are written; it is read afterwards."""
    content = HostBuffer(_WRITE_BYTES)
    content.tensor.random_(0, 256)
    link = Link("probe", _WRITE_THREADS)
    begun, written = time.perf_counter(), 0
    try:
        while written < size and (time.perf_counter() - begun < _WRITE_SECONDS or written < _LEAST_DISK_BYTES):
            file.reserve(written + _WRITE_THREADS * _WRITE_BYTES)
            offsets = [written + index * _WRITE_BYTES for index in range(_WRITE_THREADS)]
            parts = [partial(file.write, offset, content.memory) for offset in offsets]
            link.submit(len(parts) * _WRITE_BYTES, parts).wait()
            written += len(parts) * _WRITE_BYTES
        return LinkRate(written / (time.perf_counter() - begun))
    finally:
        link.close()


def _read_latency(engine: PosixEngine, path: str) -> float:
    buffer = HostBuffer(engine.unit_bytes)
    units = os.path.getsize(path) // engine.unit_bytes
    seconds = []
    for index in range(_SMALL_READS):
        # Far apart and in no order, so that nothing reads ahead.
        unit = index * 7919 % units
        begun = time.perf_counter()
        engine.read(path, unit * engine.unit_bytes, buffer.memory[: engine.unit_bytes], engine.unit_bytes)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def _processor(device: Device, memory_bytes: int, step: Callable[[], None]) -> Processor:
    asynchronous = device.torch_device.type == "cuda"
    memory = _memory_rate(device)
    operation = operation_seconds(device)
    step()
    rates = {}
    for dtype in (torch.bfloat16, torch.float32) + ((torch.float16,) if asynchronous else ()):
        rates[str(dtype).removeprefix("torch.")] = tuple(_matrix_rates(device, dtype))
        step()
    return Processor(device.hardware_name, memory_bytes, memory, operation, asynchronous, rates, device.workspace_bytes)


def _memory_rate(device: Device) -> float:
    source = torch.ones(_MEMORY_BYTES // 4, device=device.torch_device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(device, lambda: target.copy_(source))


def _matrix_rates(device: Device, dtype: torch.dtype) -> Iterator[MatrixRate]:
    count = _WEIGHTS_BYTES // (_MATRIX_EDGE**2 * dtype.itemsize)
    weights = [torch.randn(_MATRIX_EDGE, _MATRIX_EDGE, device=device.torch_device, dtype=dtype) for _ in range(count)]
    for rows in _ROWS:
        # As many as take some time, and never the same one twice in a row.
        inputs = torch.randn(rows, _MATRIX_EDGE, device=device.torch_device, dtype=dtype)
        used = weights if rows <= 8 else weights[: max(2, count // rows)]

        def multiply(inputs: torch.Tensor = inputs, used: list[torch.Tensor] = used) -> None:
            for weight in used:
                nn.functional.linear(inputs, weight)

        seconds = _median_seconds(device, multiply)
        yield MatrixRate(rows, 2.0 * rows * _MATRIX_EDGE**2 * len(used) / seconds)


def operation_seconds(device: Device, width: int = _SMALL_WIDTH, dtype: torch.dtype = torch.bfloat16) -> float:
    """Measure one operation in a model too small to compute anything: what submitting it costs, modules included.

    Args:
        width: of the hidden state; from the default on, kernels share their work among threads and pay for that.
    """
    config = LlamaConfig(vocab_size=32, hidden_size=width, intermediate_size=width, num_hidden_layers=4, num_attention_heads=2)
    model: Any = LlamaForCausalLM(config)
    model = model.to(dtype).eval()
    _, decode = DryRun(model).passes(1, 2, 2)
    operations = total([decode.between, *(wrapper.work for wrapper in decode.modules)]).operations
    model = model.to(device.torch_device)
    token = torch.zeros(1, 1, dtype=torch.long, device=device.torch_device)
    with torch.inference_mode():
        cache = model(token, use_cache=True).past_key_values

        def decode_once() -> None:
            model(token, past_key_values=cache, use_cache=True)
            cache.crop(-1)

        return _median_seconds(device, decode_once) / operations


def module_seconds(device: Device) -> float:
    """What the runtime takes around a block that has arrived: its slots, its parameters, their way back."""
    executor = LayerExecutor(device, PassClock(Recorder()))
    blocks = [_arrived_block(f"layer.{index}") for index in range(_WINDOWS)]
    executor.arrange(blocks[0].source.slot_bytes, 2, blocks)
    try:

        def pass_through() -> None:
            for block in blocks:
                executor.open([block.key])
                executor.close([block.key])

        return _median_seconds(device, pass_through) / _WINDOWS
    finally:
        executor.free()


def _arrived_block(key: str) -> StreamedBlock:
    """A block with as many parameters as a layer has, which cost nothing to load."""
    parameters = [nn.Parameter(torch.zeros(16), requires_grad=False) for _ in range(_LAYER_PARAMETERS)]
    homes = [ParameterHome(f"{key}.{index}", value, value.data, value.data) for index, value in enumerate(parameters)]
    return StreamedBlock(key, homes, _Arrived(homes))


class _Arrived:
    """A source whose block is there as soon as it is asked for."""

    def __init__(self, homes: list[ParameterHome]) -> None:
        self.offsets, self.slot_bytes = packed_offsets(homes)
        self.payload_bytes = self.slot_bytes

    def start(self, region: SlotRegion, after: Event | None) -> "_Arrived":
        return self

    def brings(self, home: ParameterHome) -> bool:
        return True

    def wait(self) -> Waits:
        return {}

    def cancel(self) -> None:
        pass


def _copies(device: Device) -> dict[str, LinkRate | None]:
    buffer, small = HostBuffer(_COPY_BYTES), HostBuffer(4096)
    target = device.allocate(_COPY_BYTES).tensor
    pageable = LinkRate(copy_bytes_per_second(device, target, buffer.tensor))
    locked = device.lock_pages(buffer)
    try:
        fast = copy_bytes_per_second(device, target, buffer.tensor) if locked else pageable.bytes_per_second
        latency = small.nbytes / copy_bytes_per_second(device, target[: small.nbytes], small.tensor)
        back = _COPY_BYTES / _median_seconds(device, lambda: buffer.tensor.copy_(target))
    finally:
        if locked:
            device.unlock_pages(buffer)
    return {"h2d": LinkRate(fast, latency), "d2h": LinkRate(back, latency), "h2d_pageable": pageable}


def _median_seconds(device: Device, run: Callable[[], object]) -> float:
    """The median of several runs, the first one not counted, within the time that one measurement may take."""
    run()
    device.synchronize()
    seconds: list[float] = []
    ends = time.perf_counter() + _POINT_SECONDS
    while not seconds or (time.perf_counter() < ends and len(seconds) < 50):
        begun = time.perf_counter()
        run()
        device.synchronize()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)
