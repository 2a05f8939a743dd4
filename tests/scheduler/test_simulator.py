"""What the simulator says, against bounds that can be computed by hand."""

from dataclasses import replace

import pytest

from offload.scheduler.cost import CostModel
from offload.scheduler.model_spec import DivisibleWeight, Workload
from offload.scheduler.plan import HostCompute
from offload.scheduler.planner import make_plan
from offload.scheduler.prediction import predict
from offload.scheduler.simulator import simulate
from offload.scheduler.trace import COMPUTE, OWN, PASS, WAIT
from offload.scheduler.work import Work
from tests.plans import edited
from tests.scheduler.machines import GIB, LAPTOP, MIB, RTX_3060, RTX_4090, machine, stack, work

ONE = Workload(1, 1, 1)
MODEL = stack(80, 400 * MIB)
MACHINES = [pytest.param(RTX_4090, id="4090"), pytest.param(RTX_3060, id="3060"), pytest.param(LAPTOP, id="laptop")]


def decode_seconds(plan, hardware, model=MODEL):
    cost = CostModel(hardware, "bfloat16")
    return predict(plan, model, cost, [work(model, "prefill", 512)], work(model, "decode", 1))


@pytest.mark.parametrize("hardware", MACHINES)
def test_from_cpu_memory_the_bus_is_the_bound(hardware):
    plan = make_plan(MODEL, hardware.device.memory_bytes * 9 // 10, ONE, 64 * GIB)
    assert set(plan.weights.in_host_memory) == set(plan.weights.streamed)
    by_hand = plan.weights.streamed_bytes / hardware.h2d.bytes_per_second
    prediction = decode_seconds(plan, hardware)
    assert 0.999 * by_hand <= prediction.seconds_per_token <= 1.05 * by_hand
    assert prediction.bound == "h2d"


@pytest.mark.parametrize("hardware", MACHINES)
def test_from_disk_the_disk_is_the_bound(hardware):
    plan = make_plan(MODEL, hardware.device.memory_bytes * 9 // 10, ONE, 2 * GIB)
    from_disk = sum(400 * MIB for key in plan.weights.streamed if key not in plan.weights.in_host_memory)
    by_hand = from_disk / hardware.disk_read.bytes_per_second
    prediction = decode_seconds(plan, hardware)
    assert 0.999 * by_hand <= prediction.seconds_per_token <= 1.1 * by_hand
    assert prediction.bound == "disk"


@pytest.mark.parametrize("hardware", MACHINES)
def test_what_fits_is_bound_by_the_card(hardware):
    small = stack(8, 400 * MIB)
    plan = make_plan(small, hardware.device.memory_bytes * 9 // 10, ONE, 64 * GIB)
    assert not plan.weights.streamed
    by_hand = 8 * 400 * MIB / hardware.device.memory_bytes_per_second
    prediction = decode_seconds(plan, hardware, small)
    assert prediction.seconds_per_token == pytest.approx(by_hand, rel=0.02)
    assert prediction.bound == "compute"


@pytest.mark.parametrize("hardware", MACHINES)
def test_a_long_prompt_hides_its_transfers(hardware):
    plan = make_plan(MODEL, hardware.device.memory_bytes * 9 // 10, ONE, 64 * GIB)
    cost = CostModel(hardware, "bfloat16")
    rows = 16_384
    by_hand = 80 * 400 * MIB * rows / max(point.flops_per_second for point in hardware.device.matrix_rates["bfloat16"])
    prediction = predict(plan, MODEL, cost, [work(MODEL, "prefill", rows)], work(MODEL, "decode", 1))
    assert 0.999 * by_hand <= prediction.prefill_seconds <= 1.1 * by_hand + 0.1


def test_spans_of_a_resource_do_not_overlap_and_fill_the_pass():
    plan = make_plan(MODEL, 8 * GIB, ONE, 6 * GIB)
    trace = simulate(
        plan, MODEL, CostModel(RTX_3060, "bfloat16"), [work(MODEL, "prefill", 64)] + [work(MODEL, "decode", 1)] * 3
    )
    for resource in (COMPUTE, "disk", "h2d"):
        spans = sorted(trace.on(resource), key=lambda span: span.begin_seconds)
        assert len(spans) > 50
        for first, second in zip(spans, spans[1:], strict=False):
            assert first.end_seconds <= second.begin_seconds + 1e-9
    assert trace.on(WAIT)
    for phase in ("prefill", "decode"):
        causes = trace.attribution(phase)
        total = sum(span.seconds for span in trace.on(PASS) if span.name == phase)
        assert sum(causes.values()) == pytest.approx(total, rel=0.01)


def test_a_twice_as_fast_disk_takes_half_the_time_where_it_is_the_bound():
    plan = make_plan(MODEL, 4 * GIB, ONE, 2 * GIB)
    fast = replace(LAPTOP, disk_read=replace(LAPTOP.disk_read, bytes_per_second=4e9))
    ratio = decode_seconds(plan, LAPTOP).seconds_per_token / decode_seconds(plan, fast).seconds_per_token
    assert ratio == pytest.approx(2, rel=0.05)


def test_the_computing_cpu_reads_from_the_disk_itself():
    alone = replace(LAPTOP, device=None, h2d=None, d2h=None, h2d_pageable=None)
    plan = make_plan(MODEL, 4 * GIB, ONE)
    prediction = decode_seconds(plan, alone)
    by_hand = plan.weights.streamed_bytes / alone.disk_read.bytes_per_second
    assert 0.999 * by_hand <= prediction.seconds_per_token <= 1.1 * by_hand


def divisible(layers, layer_bytes, products=4):
    """Layers of a few products each, all of whose rows can be shared."""
    model = stack(layers, layer_bytes)
    row_bytes = 8192
    rows = layer_bytes // products // row_bytes
    weights = (DivisibleWeight(rows, row_bytes, 2),) * products
    return replace(model, blocks=tuple(replace(block, divisible=weights) for block in model.blocks))


@pytest.mark.parametrize("percent", [25, 50, 75])
def test_a_divided_layer_takes_the_longer_of_its_halves(percent):
    """One token: the device's rows cross the bus while the CPU reads the others from its memory."""
    model = divisible(40, 400 * MIB)
    # So slow a bus that it takes nothing worth mentioning of the memory's bandwidth.
    hardware = machine(8 * GIB, 1000e9, 165e12, 1e9, 1e9)
    keys = frozenset(block.key for block in model.blocks)
    plan = make_plan(model, 8 * GIB, ONE, 40 * GIB, host_compute=HostCompute(shared=keys, percent=percent))
    assert set(plan.weights.cpu_gpu_split) == keys
    seconds = decode_seconds(plan, hardware, model).seconds_per_token
    on_bus = 40 * 400 * MIB * (1 - percent / 100) / 1e9
    on_cpu = 40 * 400 * MIB * percent / 100 / 60e9
    hops = 40 * 4 * 2e-5
    by_hand = max(on_bus, on_cpu + hops)
    assert by_hand * 0.99 <= seconds <= by_hand * 1.05 + hops


def test_a_device_and_the_cpu_compute_their_halves_at_once():
    """A device that computes behind the host's back, as busy as the CPU: one of both, not their sum."""
    cost = CostModel(machine(8 * GIB, 60e9, 1e12, 1e12, 1e9), "bfloat16")
    model = divisible(1, 400 * MIB)
    (block,) = model.blocks
    module = work(model, "decode", 1).modules[0]
    half = 200 * MIB / 60e9
    hops = 4 * 2e-5
    assert half <= cost.hybrid(module, block, 50, 0).compute_seconds <= 1.1 * half + hops


def test_attention_takes_the_larger_of_its_arithmetic_and_its_memory():
    cost = CostModel(LAPTOP, "bfloat16")
    rate = max(point.flops_per_second for point in LAPTOP.device.matrix_rates["bfloat16"])
    product = Work(1, ((1, 2.0 * 128e6),))  # 256 MB of weights at 256 GB/s
    assert cost.module(product).compute_seconds == pytest.approx(1e-3, rel=0.01)
    reading = Work(1, product.products, rate * 1e-4, int(512e6))
    assert cost.module(reading).compute_seconds == pytest.approx(3e-3, rel=0.01)
    computing = Work(1, product.products, rate * 5e-3, int(512e6))
    assert cost.module(computing).compute_seconds == pytest.approx(6e-3, rel=0.01)


def test_copies_and_the_cpu_share_the_memory():
    cost = CostModel(machine(8 * GIB, 1000e9, 165e12, 30e9, 1e9), "bfloat16")
    matvec = Work(1, ((1, 2.0 * 300e6),))  # 600 MB of weights at 60 GB/s
    alone = cost.on_host(matvec, 0)
    assert alone == pytest.approx(0.01, rel=0.01)
    # While the bus takes 30 of the 60 GB/s, it is half as fast.
    assert cost.on_host(matvec, 1) == pytest.approx(2 * alone, rel=0.01)
    assert cost.on_host(matvec, alone) == pytest.approx(1.5 * alone, rel=0.02)
    # Products of many rows do not want the memory's bandwidth.
    many = Work(1, ((4096, 2.0 * 4096 * 300e6),))
    assert cost.on_host(many, 1e3) == pytest.approx(cost.on_host(many, 0))


def test_micro_batches_read_the_weights_again_in_each_part():
    plan = make_plan(MODEL, 40 * GIB, ONE, 64 * GIB)
    cost = CostModel(RTX_4090, "bfloat16")
    decode = work(MODEL, "decode", 32, batch_size=32)
    whole = simulate(plan, MODEL, cost, [decode]).end_seconds
    parts = simulate(edited(plan, "splits", decode_micro_batch=8), MODEL, cost, [decode]).end_seconds
    assert parts == pytest.approx(4 * whole, rel=0.05)


def test_the_runtime_takes_time_for_each_streamed_window():
    plan = make_plan(MODEL, 8 * GIB, ONE, 64 * GIB)
    slow = replace(LAPTOP, device=replace(LAPTOP.device, asynchronous=False))
    decode = work(MODEL, "decode", 1)
    without = simulate(plan, MODEL, CostModel(slow, "bfloat16"), [decode])
    with_it = simulate(plan, MODEL, CostModel(replace(slow, module_seconds=1.0), "bfloat16"), [decode])
    spent = with_it.attribution()[OWN]
    assert spent == pytest.approx(len(plan.weights.streamed))
    assert with_it.end_seconds >= without.end_seconds
    assert OWN not in without.attribution()
