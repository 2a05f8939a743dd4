"""`offload plan`: what would live where, how fast it would be, and what would help."""

import json
from pathlib import Path

from rich.table import Table
from transformers.utils import logging as transformers_logging

from offload.cli.arguments.plan import PlanArguments
from offload.cli.terminal import check_writable, print_table, progress_bar, say
from offload.kv.options import KvOptions
from offload.moe.options import ExpertOptions
from offload.scheduler.hardware import HardwareProfile
from offload.scheduler.plan import Plan
from offload.session.preview import Planner, PlanRequest, PlanResult
from offload.session.training_preview import TrainingPlan
from offload.storage.errors import counted, duration, gib
from offload.training.options import Training

_HELPS = 1.01
"""Times as fast: less is none."""


def run(request: PlanArguments) -> None:
    output, memory = request.output, request.memory
    check_writable(output.output)
    transformers_logging.set_verbosity_error()
    asked = PlanRequest(
        request.work.prompt_tokens,
        request.work.new_tokens,
        request.work.batch_size,
        memory.gpu_memory,
        memory.cpu_memory,
        request.loading.exactness,
        ExpertOptions(request.experts.expert_policy),
        KvOptions.parse(request.kv.kv_memory, request.kv.kv_policy, request.kv.kv_budget),
    )
    hardware = None if memory.hardware is None else HardwareProfile.load(memory.hardware)
    with progress_bar() as show:
        loading = request.loading
        planner = Planner(
            request.model,
            hardware,
            memory.device,
            memory.disk,
            show,
            dtype=loading.dtype,
            weights=loading.weights,
            weights_head=loading.weights_head,
            trust_remote_code=loading.trust_remote_code,
            gguf_file=loading.gguf_file,
        )
    if request.training.train is not None:
        _show_training(planner, asked, request)
        return
    planned = planner.plan(asked)
    if output.output:
        Path(output.output).write_text(planned.plan.to_json())
    if output.json:
        print(json.dumps(planned.to_dict()))
    else:
        _print(planned, asked)
        if output.output:
            given = {"--device": memory.device, "--gpu-memory": memory.gpu_memory, "--cpu-memory": memory.cpu_memory}
            budgets = "".join(f" {name} {value}" for name, value in given.items() if value not in (None, "auto"))
            say(f"written to {output.output}; run it with: offload generate {request.model} --plan {output.output}{budgets}")


def _show_training(planner: Planner, asked: PlanRequest, request: PlanArguments) -> None:
    chosen = request.training
    training = Training(
        full=chosen.train == "full",
        optimizer=chosen.optimizer,
        state_tier=chosen.state_tier,
        activation_tier=chosen.activation_tier,
    )
    planned = planner.plan_training(asked, training, chosen.rank, chosen.gradient_accumulation)
    if request.output.json:
        print(json.dumps(planned.to_dict()))
        return
    sequences = counted(asked.batch_size * chosen.gradient_accumulation, "sequence")
    print(f"{planned.model}: {gib(planned.weight_bytes)} of weights, on {planned.hardware}")
    print(f"a step of {chosen.train} on {sequences} of {asked.prompt_tokens:,} tokens\n\n{planned.estimate}\n")
    print_table(_places(planned))
    for tier, peak in planned.peak_bytes.items():
        print(f"{tier}: {gib(peak)} at the peak, of {gib(planned.budget_bytes[tier])}")
    weights = planned.plan.weights
    print(f"{gib(weights.streamed_bytes)} streamed in each of two passes over the layers")
    for note in planned.notes:
        print(f"note: {note}")


def _print(planned: PlanResult, asked: PlanRequest) -> None:
    prediction, plan = planned.prediction, planned.plan
    print(f"{planned.model}: {gib(planned.weight_bytes)} of weights, on {planned.hardware}")
    print(
        f"{asked.batch_size} x ({asked.prompt_tokens} + {asked.new_tokens} tokens): time to first token (TTFT) "
        f"{duration(prediction.prefill_seconds)}, then {duration(prediction.seconds_per_token)} a token (TPOT), "
        f"{prediction.tokens_per_second:.2f} tokens/s in all; bound by {prediction.bound}\n"
    )
    print_table(_places(planned))
    print_table(_memory(planned))
    shares = ", ".join(f"{cause} {share:.0%}" for cause, share in prediction.decode_shares.items() if share >= 0.005)
    print(
        f"a token: {shares}; {gib(plan.weights.streamed_bytes)} streamed, {counted(plan.weights.slot_count, 'slot')} of "
        f"{gib(plan.weights.slot_bytes)}\n"
    )
    if plan.kv.memory_bytes:
        _print_pages(plan)
    if planned.by_hit_rate:
        _print_hit_rates(planned)
    if all(item.speedup < _HELPS for item in planned.what_if):
        print("nothing that was tried would make it faster\n")
    changes = Table(box=None, pad_edge=False, header_style="bold")
    changes.add_column("what if")
    changes.add_column("a sequence is done", justify="right")
    for item in (item for item in planned.what_if if item.speedup >= _HELPS):
        changes.add_row(item.change, f"{item.speedup:.2f}x as fast")
    encodings = {item.change.split()[1]: item.speedup for item in planned.what_if if item.change.startswith("weights ")}
    if encodings and all(speedup < _HELPS for speedup in encodings.values()):
        given = ", ".join(f"{kind} {speedup:.2f}x" for kind, speedup in encodings.items())
        print(f"encoding the weights (--weights) would not make it faster here: {given}\n")
    if changes.row_count:
        print_table(changes)
    for note in planned.notes:
        print(f"note: {note}")


def _print_pages(plan: Plan) -> None:
    elsewhere = f", {gib(plan.kv.host_bytes)} in CPU memory" if plan.kv.host_bytes else ""
    read = "read piece by piece" if plan.kv.segments else "a layer put together at a time"
    print(f"KV cache: {gib(plan.kv.memory_bytes)} on the device{elsewhere}, the rest on disk; {read}\n")


def _print_hit_rates(planned: PlanResult) -> None:
    plan = planned.plan
    elsewhere = f", {plan.experts.in_host_memory:,} in CPU memory" if "gpu" in planned.budget_bytes else ""
    print(f"experts: {plan.experts.slots:,} in device memory{elsewhere}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("if so many of a token's experts are there", "a token takes", ""):
        table.add_column(column, justify="right" if column else "left")
    for rate, seconds in planned.by_hit_rate.items():
        expected = planned.expected_hit_rate is not None and rate == round(planned.expected_hit_rate, 2)
        table.add_row(f"{rate:.0%}", duration(seconds), "expected" if expected else "")
    print_table(table)


def _places(planned: PlanResult | TrainingPlan) -> Table:
    plan = planned.plan
    disk = [key for key in plan.weights.streamed if key not in plan.weights.in_host_memory]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("blocks", "how many", "which"):
        table.add_column(column)
    rows = {
        "stay on the device": plan.weights.resident,
        "stream from CPU memory": [key for key in plan.weights.in_host_memory if key not in plan.weights.cpu_gpu_split],
        f"stream so, {plan.weights.cpu_percent}% on the CPU": plan.weights.cpu_gpu_split,
        "computed on the CPU": plan.weights.computed_on_host,
        "stream from disk": disk,
        "read by row": plan.weights.row_fetched,
    }
    for name, keys in rows.items():
        if keys:
            table.add_row(name, str(len(keys)), _short(list(keys)))
    return table


def _short(keys: list[str]) -> str:
    return ", ".join(keys) if len(keys) <= 4 else f"{keys[0]}, {keys[1]}, ... {keys[-1]}"


def _memory(planned: PlanResult) -> Table:
    plan = planned.plan
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("memory", "budget", "peak", "of which"):
        table.add_column(column)
    parts = {
        "resident weights": plan.weights.resident_bytes + plan.weights.always_resident_bytes,
        "slots": plan.arena_bytes,
        "experts": plan.expert_bytes,
        "KV cache": plan.kv.reserved_bytes,
        "activations": plan.activation_bytes,
    }
    computing = next(iter(planned.budget_bytes))
    for tier, budget in planned.budget_bytes.items():
        named = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
        pages = f", pages of the KV cache {gib(plan.kv.host_bytes)}" if plan.kv.host_bytes else ""
        what = named if tier == computing else f"weights, staging{pages}"
        table.add_row(tier, gib(budget), gib(planned.peak_bytes[tier]), what)
    return table
