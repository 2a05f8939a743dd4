"""Machines and models that are described, for tests of decisions."""

from offload.scheduler.hardware import HardwareProfile, LinkRate, MatrixRate, Processor
from offload.scheduler.model_spec import BlockRole, ModelSpec, PlacedBlock
from offload.scheduler.work import ModuleWork, PassWork, Work

MIB, GIB = 1 << 20, 1 << 30


def processor(name: str, memory: float, bandwidth: float, flops: float, *, gpu: bool = False) -> Processor:
    """Bound by reading weights (bf16) up to the row where arithmetic is."""
    ridge = max(2, round(flops / bandwidth))
    rates = tuple(MatrixRate(rows, min(rows * bandwidth, flops)) for rows in (1, ridge, 16 * ridge))
    return Processor(name, int(memory), bandwidth, 1e-5, gpu, {"bfloat16": rates})


def machine(vram: float, device_bandwidth: float, flops: float, h2d: float, disk: float) -> HardwareProfile:
    """A card on a bus, beside a CPU with 60 GB/s of memory bandwidth and 1 TFLOP/s."""
    return HardwareProfile(
        hardware_id="described",
        description="described",
        measured_at="",
        host=processor("host", 64 * GIB, 60e9, 1e12),
        device=processor("card", vram, device_bandwidth, flops, gpu=True),
        disk_read=LinkRate(disk, 1e-4),
        disk_write=LinkRate(disk / 2),
        h2d=LinkRate(h2d, 1e-5),
        d2h=LinkRate(h2d, 1e-5),
        h2d_pageable=LinkRate(h2d / 3),
    )


RTX_4090 = machine(24 * GIB, 1008e9, 165e12, 25e9, 7e9)
RTX_3060 = machine(12 * GIB, 360e9, 51e12, 12e9, 3.5e9)
LAPTOP = machine(8 * GIB, 256e9, 30e12, 6e9, 2e9)


def stack(layers: int, layer_bytes: int) -> ModelSpec:
    """Layers alone, each a window of its own."""
    blocks = tuple(
        PlacedBlock(f"layers.{index}", BlockRole.LAYER, layer_bytes, layer_bytes, layer_bytes) for index in range(layers)
    )
    return ModelSpec(blocks, tuple((block.key,) for block in blocks))


def work(model: ModelSpec, phase: str, rows: int, batch_size: int = 1) -> PassWork:
    """Two FLOPs a bf16 weight and row, and nothing else."""
    modules = tuple(
        ModuleWork(block.key, (block.key,), Work(1, ((rows, float(rows * block.stored_bytes)),)), result_bytes=rows * 8192)
        for block in model.blocks
    )
    return PassWork(phase, batch_size, rows // batch_size, modules, Work())
