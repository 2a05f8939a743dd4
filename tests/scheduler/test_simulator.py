"""What the simulator says, against bounds that can be computed by hand."""

from dataclasses import replace

import pytest

from scheduler.cost import CostModel
from scheduler.model_spec import Workload
from scheduler.planner import make_plan
from scheduler.prediction import predict
from scheduler.simulator import simulate
from scheduler.trace import COMPUTE, PASS, WAIT
from tests.scheduler.machines import GIB, LAPTOP, MIB, RTX_3060, RTX_4090, stack, work

ONE = Workload(1, 1, 1)
MODEL = stack(80, 400 * MIB)
MACHINES = [pytest.param(RTX_4090, id="4090"), pytest.param(RTX_3060, id="3060"), pytest.param(LAPTOP, id="laptop")]


def decode_seconds(plan, hardware, model=MODEL):
    cost = CostModel(hardware, "bfloat16")
    return predict(plan, model, cost, [work(model, "prefill", 512)], work(model, "decode", 1))


@pytest.mark.parametrize("hardware", MACHINES)
def test_from_cpu_memory_the_bus_is_the_bound(hardware):
    plan = make_plan(MODEL, hardware.device.memory_bytes * 9 // 10, ONE, 64 * GIB)
    assert set(plan.in_host_memory) == set(plan.streamed)
    by_hand = plan.streamed_bytes / hardware.h2d.bytes_per_second
    prediction = decode_seconds(plan, hardware)
    assert 0.999 * by_hand <= prediction.seconds_per_token <= 1.05 * by_hand
    assert prediction.bound == "h2d"


@pytest.mark.parametrize("hardware", MACHINES)
def test_from_disk_the_disk_is_the_bound(hardware):
    plan = make_plan(MODEL, hardware.device.memory_bytes * 9 // 10, ONE, 2 * GIB)
    from_disk = sum(400 * MIB for key in plan.streamed if key not in plan.in_host_memory)
    by_hand = from_disk / hardware.disk_read.bytes_per_second
    prediction = decode_seconds(plan, hardware)
    assert 0.999 * by_hand <= prediction.seconds_per_token <= 1.1 * by_hand
    assert prediction.bound == "disk"


@pytest.mark.parametrize("hardware", MACHINES)
def test_what_fits_is_bound_by_the_card(hardware):
    small = stack(8, 400 * MIB)
    plan = make_plan(small, hardware.device.memory_bytes * 9 // 10, ONE, 64 * GIB)
    assert not plan.streamed
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
    by_hand = plan.streamed_bytes / alone.disk_read.bytes_per_second
    assert 0.999 * by_hand <= prediction.seconds_per_token <= 1.1 * by_hand
