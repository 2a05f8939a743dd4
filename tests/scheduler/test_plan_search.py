"""The chosen plan, against all plans where there are few."""

import itertools
from dataclasses import replace

import pytest

from offload.scheduler.cost import CostModel
from offload.scheduler.model_spec import ActivationSizes, Workload
from offload.scheduler.plan import HostCompute
from offload.scheduler.plan_search import LayerPlacement, SearchProblem, choose_plan, evaluate, solve
from offload.storage.errors import BudgetTooSmall
from tests.scheduler.machines import GIB, LAPTOP, MIB, RTX_3060, RTX_4090, machine, stack, work

WORKLOADS = {"chat": (32, 1, 200), "batch": (32 * 64, 32, 100), "long prompt": (8192, 1, 20)}


def task(model, hardware, device_bytes, host_bytes, rows, batch_size, new_tokens):
    return SearchProblem(
        model,
        Workload(batch_size, 1, 1),
        (work(model, "prefill", rows, batch_size),),
        work(model, "decode", batch_size, batch_size),
        new_tokens,
        CostModel(hardware, "bfloat16"),
        device_bytes,
        host_bytes,
    )


@pytest.mark.parametrize("workload", list(WORKLOADS))
@pytest.mark.parametrize("host", [3, 20], ids=["little CPU memory", "much"])
@pytest.mark.parametrize(
    "hardware", [RTX_4090, LAPTOP, machine(8 * GIB, 256e9, 30e12, 1e9, 1e9)], ids=["fast", "slow", "slow bus"]
)
def test_as_good_as_every_set_of_layers_tried(hardware, host, workload):
    model = stack(6, 400 * MIB)
    asked = task(model, hardware, 1300 * MIB, host * 400 * MIB, *WORKLOADS[workload])
    best = choose_plan([asked], allow_cpu=True).seconds(asked)
    keys = [block.key for block in model.blocks]
    tried = []
    for count in range(len(keys) + 1):
        for chosen in itertools.combinations(keys, count):
            try:
                tried.append(evaluate(asked, HostCompute(whole=frozenset(chosen))).seconds(asked))
            except BudgetTooSmall:
                continue
    assert len(tried) >= 7
    assert best <= 1.05 * min(tried)


def test_the_cpu_computes_where_the_bus_is_slow_and_not_where_it_is_fast():
    model = stack(40, 400 * MIB)
    slow = task(model, machine(8 * GIB, 256e9, 30e12, 4e9, 2e9), 6 * GIB, 64 * GIB, *WORKLOADS["chat"])
    assert len(choose_plan([slow], allow_cpu=True).plan.weights.computed_on_host) > 10
    assert not choose_plan([slow], allow_cpu=False).plan.weights.computed_on_host
    long = task(model, RTX_4090, 6 * GIB, 64 * GIB, *WORKLOADS["long prompt"])
    assert not choose_plan([long], allow_cpu=True).plan.weights.computed_on_host


def test_the_program_keeps_within_the_budgets():
    model = stack(126, 400 * MIB)
    asked = task(model, RTX_3060, 10 * GIB, 20 * GIB, *WORKLOADS["chat"])
    (counts,) = solve(asked, model.blocks)
    assert sum(counts.values()) == 126
    assert counts[LayerPlacement.DEVICE] * 400 * MIB <= 10 * GIB
    assert (counts[LayerPlacement.HOST] + counts[LayerPlacement.CPU]) * 400 * MIB <= 20 * GIB
    plan = choose_plan([asked], allow_cpu=True).plan
    assert plan.device_bytes <= 10 * GIB
    assert (len(plan.weights.in_host_memory) + len(plan.weights.computed_on_host)) * 400 * MIB <= 20 * GIB
    plan.check(model)


def test_a_pass_is_taken_apart_where_what_stays_is_worth_more():
    """Temporaries of a large batch take the room of most layers; in parts, the layers stay."""
    model = replace(stack(10, 400 * MIB), activations=ActivationSizes(MIB, 0, MIB // 64))
    whole = task(model, machine(8 * GIB, 1000e9, 100e12, 4e9, 2e9), 4 * GIB, 64 * GIB, 64 * 32, 64, 50)
    whole = replace(whole, workload=Workload(64, 32, 32))
    tasks = [whole, *(replace(whole, workload=Workload(64, 32, 32, micro_batch=size)) for size in (32, 16, 8))]
    choice = choose_plan(tasks, allow_cpu=False)
    assert choice.plan.splits.micro_batch in (32, 16, 8)
    assert len(choice.plan.weights.resident) > len(evaluate(whole).plan.weights.resident)
    assert choice.seconds(whole) < evaluate(whole).seconds(whole)
    # Where there is room for all, nothing is.
    roomy = [replace(item, device_bytes=40 * GIB) for item in tasks]
    assert not choose_plan(roomy, allow_cpu=False).plan.rounds
