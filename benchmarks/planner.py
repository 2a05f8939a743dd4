"""Is the prediction right, and is the choice good?

On a machine of known rates (benchmarks/throttled.py): predicted and simulated against measured times, and the chosen plan
against fixed ones. On the real disk: probe and run by turns, with the error split into the drift of the disk and the error
of the model; and the peak of memory (benchmarks/peak.py). Prints tables, writes JSON.

    python -m benchmarks.planner [--only SECTION] [--model DIR] [--rounds 5] [--output FILE.json]
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.memory_group import available
from benchmarks.peak import peaks
from benchmarks.throttled import Rates, Speed, machine, paced_products
from offload import offload
from offload.budgets import Budgets
from offload.model.blocks import WHOLE_BLOCKS
from offload.planning.dry_run import DryRun
from offload.planning.predictor import PlanGoal, Predictor
from offload.probe import measure, module_seconds
from offload.scheduler.hardware import HardwareProfile
from offload.scheduler.host_memory import spread
from offload.scheduler.model_spec import BlockRole, ModelSpec, Workload
from offload.scheduler.plan import DEVICE_ALONE, HostCompute, Plan
from offload.scheduler.plan_sections import WeightsPlan
from offload.scheduler.planner import make_plan
from offload.scheduler.simulator import simulate
from offload.scheduler.work import total
from offload.storage.devices.cpu import CpuDevice
from offload.storage.errors import BudgetTooSmall

_SIZES = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
_CPU = Speed(0.5e9, 30e9)
ALONE = Rates(disk=100e6, link=None, device=_CPU, host=_CPU)
BESIDE = Rates(disk=100e6, link=0.3e9, device=Speed(0.5e9, 30e9), host=Speed(0.2e9, 6e9))
NEW_TOKENS = 10
_NOTHING_ELSEWHERE = Plan(WeightsPlan())


def models() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**_SIZES, num_hidden_layers=8)).eval(),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**_SIZES, num_hidden_layers=12)).eval(),
    }


def paced_operation_seconds(rates: Rates) -> float:
    """Of a tensor operation where the products between are paced: after each pause the caches are cold."""
    model = LlamaForCausalLM(LlamaConfig(**_SIZES, num_hidden_layers=2)).eval()
    _, decode = DryRun(model).passes(1, 8, 8)
    work = total([decode.between, *(window.work for window in decode.modules)])
    products = sum(rates.device.product_seconds(count, int(flops / count / 2)) for count, flops in work.products)
    token, seconds = torch.ones(1, 1, dtype=torch.long), []
    with torch.inference_mode(), paced_products(model, rates, _NOTHING_ELSEWHERE):
        cache = model(torch.ones(1, 8, dtype=torch.long), use_cache=True).past_key_values
        for _ in range(15):
            begun = time.perf_counter()
            model(token, past_key_values=cache, use_cache=True)
            seconds.append(time.perf_counter() - begun)
            cache.crop(-1)
    return max(0.0, statistics.median(seconds) - products) / work.operations


def run(
    folder: str,
    rates: Rates,
    profile: HardwareProfile,
    budgets: dict[str, int],
    shape: tuple[int, int, int],
    **options: Any,
) -> dict[str, Any]:
    """One session on the throttled machine: measured, predicted, and simulated in as many passes as were run."""
    batch_size, prompt, new = shape
    tokens = torch.randint(0, 512, (batch_size, prompt), generator=torch.Generator().manual_seed(1))
    reserve = {"batch_size": batch_size, "max_tokens": prompt + new, "new_tokens": new}
    with machine(rates), offload(folder, hardware=profile, **reserve, **budgets, **options) as session:
        with paced_products(session.model, rates, session.plan), torch.inference_mode():
            session.model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
            )
        report = session.report()
        trace = session.trace()
        plan = session.plan
        seconds = report.prefill.seconds + report.decode.seconds
        simulated = _simulated_seconds(session, prompt, new)
    prediction = report.prediction
    assert prediction is not None
    wall = sum(span.seconds for span in trace.on("pass"))
    causes = trace.attribution()
    return {
        "resident": len(plan.weights.resident),
        "from_cpu_memory": len(plan.weights.in_host_memory),
        "on_cpu": len(plan.weights.computed_on_host),
        "divided": len(plan.weights.cpu_gpu_split),
        "rounds": list(plan.rounds),
        "prefill": (prediction.prefill_seconds, prediction.prefill_measured_seconds),
        "token": (prediction.seconds_per_token, prediction.measured_seconds_per_token),
        "seconds": seconds,
        "simulated": simulated,
        "bound": prediction.bound,
        "attributed": 1 - causes["between blocks"] / wall,
        "tracing": report.tracing["seconds"] / wall,
    }


def _simulated_seconds(session: Any, prompt: int, new: int) -> float:
    """The same passes one after another on the virtual clock."""
    forecast, plan = session._parts.prepared.predictor, session.plan
    batch_size = session.machine.clock.phases["prefill"].batch_size
    prefill, decode = forecast.work(
        session._parts.residency.spec, batch_size, prompt, prompt + new // 2, plan.splits.prefill_chunk
    )
    passes = [*prefill, *[decode] * (new - 1)]
    return sum(span.seconds for span in simulate(plan, session._parts.residency.spec, forecast.cost, passes).on("pass"))


def accuracy(profile_of: Callable[[Rates], HardwareProfile]) -> list[dict[str, Any]]:
    rows = []
    for name, model in models().items():
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            weights = sum(value.nbytes for value in model.parameters())
            for where, rates in (("cpu", ALONE), ("device", BESIDE)):
                for share in (0.4, 0.6, 0.8):
                    for batch_size, prompt in ((1, 64), (8, 32)):
                        budgets = _budgets(rates, weights, share)
                        shape = batch_size, prompt, NEW_TOKENS
                        found = run(folder, rates, profile_of(rates), budgets, shape, exactness="rounding")
                        rows.append({"model": name, "machine": where, "budget": share, "batch": batch_size} | found)
                        _print_accuracy(rows[-1])
    return rows


def taken_apart(profile_of: Callable[[Rates], HardwareProfile]) -> list[dict[str, Any]]:
    """The same table for plans that are given: layers that both processors compute, micro-batches, chunks of a prompt."""
    rows = []
    batch_size, prompt = 8, 64
    profile = profile_of(BESIDE)
    for name, model in models().items():
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            weights = sum(value.nbytes for value in model.parameters())
            for share in (0.4, 0.6, 0.8):
                budgets = {"gpu_memory": int(weights * share / 2) + (40 << 20), "cpu_memory": int(weights * 1.5)}
                spec = _spec(folder, profile, budgets, batch_size, prompt + NEW_TOKENS)
                workload = Workload(batch_size, prompt + NEW_TOKENS, prompt + NEW_TOKENS)
                for kind, plan in _apart(spec, workload, budgets).items():
                    shape = batch_size, prompt, NEW_TOKENS
                    found = run(folder, BESIDE, profile, budgets, shape, plan=plan, exactness="rounding")
                    rows.append({"model": name, "machine": kind, "budget": share, "batch": batch_size} | found)
                    _print_accuracy(rows[-1])
    return rows


def _apart(spec: ModelSpec, workload: Workload, budgets: dict[str, int]) -> dict[str, Plan]:
    def plan(workload: Workload, beside: HostCompute = DEVICE_ALONE) -> Plan:
        return make_plan(spec, budgets["gpu_memory"], workload, budgets["cpu_memory"], host_compute=beside)

    whole = plan(workload)
    layers = {block.key for block in spec.layers}
    streamed = frozenset(key for key in whole.weights.in_host_memory if key in layers)
    return {
        "20% on the CPU": plan(workload, HostCompute(shared=streamed, percent=20)),
        "60% on the CPU": plan(workload, HostCompute(shared=streamed, percent=60)),
        "micro-batch 2": plan(replace(workload, micro_batch=2)),
        "chunks of 16": plan(replace(workload, prefill_chunk=16)),
    }


def _budgets(rates: Rates, weights: int, share: float) -> dict[str, int]:
    reserve = 12 << 20
    if rates.link is None:
        return {"cpu_memory": int(weights * share) + reserve}
    return {"gpu_memory": int(weights * share / 2) + reserve, "cpu_memory": int(weights * share)}


def _print_accuracy(row: dict[str, Any]) -> None:
    errors = [row[kind][0] / row[kind][1] - 1 for kind in ("prefill", "token")]
    simulated = row["simulated"] / row["seconds"] - 1
    print(
        f"{row['model']:6} {row['machine']:14} {row['budget']:.0%} batch {row['batch']}: {row['resident']:2} resident, "
        f"{row['from_cpu_memory']:2} from CPU memory, {row['on_cpu']:2} on the CPU; prefill {row['prefill'][1] * 1e3:6.0f} ms "
        f"({errors[0]:+.1%}), token {row['token'][1] * 1e3:6.1f} ms ({errors[1]:+.1%}), simulated {simulated:+.1%}; "
        f"bound {row['bound']}, "
        f"attributed {row['attributed']:.1%}, tracing took {row['tracing']:.3%}",
        flush=True,
    )


WORKLOADS = {"chat at batch 1": (1, 32, 24), "batch 32": (32, 16, 8), "long prompt": (1, 1024, 2)}


def choice(profile_of: Callable[[Rates], HardwareProfile]) -> list[dict[str, Any]]:
    """The chosen plan against fixed ones, each run."""
    rows = []
    model = models()["llama"]
    weights = sum(value.nbytes for value in model.parameters())
    host_bytes = int(weights * 1.3)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name, (batch_size, prompt, new) in WORKLOADS.items():
            profile = profile_of(BESIDE)
            spec = _spec(folder, profile, {"gpu_memory": 1 << 30, "cpu_memory": 1 << 30}, batch_size, prompt + new)
            workload = Workload(batch_size, prompt + new, prompt + new)
            device_bytes = int(weights * 0.4) + workload.kv_bytes(spec) + workload.activation_bytes(spec)
            budgets = {"gpu_memory": device_bytes, "cpu_memory": host_bytes}
            forecast = Predictor(model, WHOLE_BLOCKS, profile, "float32")
            order = PlanGoal(workload, prompt, new, Budgets(device_bytes, host_bytes), "rounding")
            plans = {"chosen": forecast.best(spec, order)[0]} | fixed_plans(spec, workload, device_bytes, host_bytes)
            for kind, plan in plans.items():
                found = run(folder, BESIDE, profile, budgets, (batch_size, prompt, new), plan=plan, exactness="rounding")
                rows.append({"workload": name, "plan": kind} | found)
            best = min(row["seconds"] for row in rows if row["workload"] == name and row["plan"] != "chosen")
            print(f"{name}:", flush=True)
            for row in rows:
                if row["workload"] == name:
                    print(
                        f"  {row['plan']:22} {row['seconds']:6.2f} s ({row['seconds'] / best:.2f} of the best fixed); "
                        f"{row['resident']} resident, {row['from_cpu_memory']} from CPU memory, {row['on_cpu']} on the CPU",
                        flush=True,
                    )
    return rows


def _spec(folder: str, profile: HardwareProfile, budgets: dict[str, int], batch_size: int, tokens: int) -> ModelSpec:
    with machine(BESIDE), offload(folder, hardware=profile, batch_size=batch_size, max_tokens=tokens, **budgets) as session:
        return session._parts.residency.spec


def fixed_plans(spec: ModelSpec, workload: Workload, device_bytes: int, host_bytes: int) -> dict[str, Plan]:
    layers = [block.key for block in spec.blocks if block.role is BlockRole.LAYER]
    others = frozenset(block.key for block in spec.blocks) - frozenset(layers)
    shuffled = [block.key for block in spread([block for block in spec.blocks if block.role is BlockRole.LAYER])]
    half = len(layers) // 2

    def plan(resident: list[str], beside: HostCompute = DEVICE_ALONE, extra_slots: int = 0) -> Plan | None:
        try:
            made = make_plan(spec, device_bytes, workload, host_bytes, others | frozenset(resident), beside)
        except BudgetTooSmall:
            return None
        room = (device_bytes - made.device_bytes) // made.weights.slot_bytes if made.weights.slot_bytes else 0
        weights = replace(made.weights, slot_count=made.weights.slot_count + min(extra_slots, room))
        return replace(made, weights=weights)

    wanted = {
        "all streamed": plan([]),
        "first half resident": plan(layers[:half]),
        "half resident, spread": plan(shuffled[:half]),
        "deepest prefetch": plan([], extra_slots=len(layers)),
        "all computed on CPU": plan([], HostCompute(whole=frozenset(layers))),
        **{f"{count} computed on CPU": plan(layers, HostCompute(whole=frozenset(shuffled[:count]))) for count in (2, 4, 6)},
        **{
            f"all divided, {percent}%": plan([], HostCompute(frozenset(), frozenset(layers), percent))
            for percent in (20, 50, 80)
        },
    }
    streamed = frozenset(
        key for key in make_plan(spec, device_bytes, workload, host_bytes).weights.in_host_memory if key in layers
    )
    for percent in (20, 40, 60, 80):
        wanted[f"streamed divided, {percent}%"] = plan(layers, HostCompute(frozenset(), streamed, percent))
    return {name: made for name, made in wanted.items() if made is not None}


def disk(folder: str, rounds: int) -> list[dict[str, Any]]:
    """Probe and run by turns; the profile's disk speed is what the probe just found."""
    rows = []
    sample = max(Path(folder).glob("*.safetensors"), key=lambda path: path.stat().st_size)
    for _ in range(rounds):
        profile = measure(CpuDevice(), folder, lambda what, done, total: None, str(sample))
        for share in (0.45, 0.7):
            budget = int(sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) * share)
            tokens = torch.randint(10, 200, (1, 32), generator=torch.Generator().manual_seed(1))
            with offload(folder, device="cpu", cpu_memory=budget, max_tokens=64, hardware=profile) as session:
                with torch.inference_mode():
                    session.model.generate(input_ids=tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False)
                found = session.report().prediction
            assert found is not None
            rows.append(
                {
                    "budget": share,
                    "token": (found.seconds_per_token, found.measured_seconds_per_token),
                    "error": found.seconds_per_token_error,
                    "drift": found.drift["disk"],
                    "model_error": found.model_error,
                }
            )
            row = rows[-1]
            print(
                f"budget {share:.0%}: token {row['token'][1] * 1e3:.0f} ms, error {row['error']:+.0%}; "
                f"the disk drifted by {row['drift']:+.0%}, the model's own error {row['model_error']:+.0%}",
                flush=True,
            )
    for name in ("error", "model_error"):
        print(f"median of |{name}|: {statistics.median(abs(row[name]) for row in rows):.1%}")
    return rows


def speed() -> dict[str, float]:
    """Of deciding: a plan for 126 layers on three tiers, and 5,000 simulated layer steps."""
    from offload.scheduler.cost import CostModel
    from offload.scheduler.plan_search import SearchProblem, choose_plan
    from tests.scheduler.machines import GIB, MIB, RTX_3060, stack, work

    model = stack(126, 400 * MIB)
    cost = CostModel(RTX_3060, "bfloat16")
    prefill, decode = work(model, "prefill", 512), work(model, "decode", 1)
    task = SearchProblem(model, Workload(1, 1, 1), (prefill,), decode, 128, cost, 10 * GIB, 20 * GIB)
    seconds: dict[str, list[float]] = {"plan": [], "simulate": []}
    for _ in range(5):
        begun = time.perf_counter()
        plan = choose_plan([task], allow_cpu=True).plan
        seconds["plan"].append(time.perf_counter() - begun)
        begun = time.perf_counter()
        simulate(plan, model, cost, [decode] * 40)
        seconds["simulate"].append(time.perf_counter() - begun)
    found = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"a plan for 126 layers: {found['plan'] * 1e3:.0f} ms; 5,040 layer steps simulated: {found['simulate'] * 1e3:.0f} ms")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("accuracy", "apart", "choice", "disk", "memory", "speed"))
    parser.add_argument("--model", help="a checkpoint of some GB, for the real disk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", metavar="FILE.json")
    request = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    result: dict[str, Any] = {"cpu": CpuDevice().hardware_name, "python": platform.python_version(), "torch": torch.__version__}
    for name, section in _sections(request):
        if request.only in (None, name):
            print(f"\n{name}", flush=True)
            result[name] = section()
    if request.output:
        Path(request.output).write_text(json.dumps(result, indent=1))


def _sections(request: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    def throttled(section: Callable[[Callable[[Rates], HardwareProfile]], Any]) -> Callable[[], Any]:
        def go() -> Any:
            # One thread: the paces are kept by threads of their own.
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return section(lambda rates: rates.profile(paced_operation_seconds(rates), module_seconds(CpuDevice())))
            finally:
                torch.set_num_threads(threads)

        return go

    yield "speed", speed
    yield "accuracy", throttled(accuracy)
    yield "apart", throttled(taken_apart)
    yield "choice", throttled(choice)
    if request.model:
        yield "disk", lambda: disk(request.model, request.rounds)
        if available():
            yield "memory", lambda: peaks(request.model)


if __name__ == "__main__":
    main()
