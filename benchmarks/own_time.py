"""Claim: what the runtime does around a block, beside computing and waiting, takes some hundred microseconds.

From the spans of a session's clock: `own` is what asks for blocks, binds and releases them; `between` is the model's code
outside of the blocks. Both are divided by the blocks that were asked for, streamed ones and resident ones. Beside them, what
the machine asks for single steps of that: to wake a thread that sleeps; and the same small call in a loop, and between two
products of torch, which push Python's code and the kernel's out of the processor's caches.

    python -m benchmarks.own_time [--only WORD] [--rounds 3] [--out FILE.json]
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.checkout import commit
from offload import Session, Training, offload
from offload.scheduler.phases import BACKWARD, DECODE, PREFILL, PhaseTimes
from offload.storage.process_memory import anonymous_bytes
from offload.synth import synthesize

MODEL_BYTES = 100_000_000
TOKENS = 40
_WAKES = 200


@dataclass(frozen=True)
class Case:
    """One capability.

    Attributes:
        budget_mib: of CPU memory.
        phases: whose time is looked at.
        options: of the session, given a folder.
    """

    name: str
    family: str
    budget_mib: int
    phases: tuple[str, ...]
    use: Callable[[Session, int], None]
    options: Callable[[str], dict[str, Any]] = lambda folder: {}


def decode(session: Session, steps: int) -> None:
    prompt = torch.arange(3, 19)[None]
    with torch.inference_mode():
        session.model.generate(prompt, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)


def prefill(session: Session, steps: int) -> None:
    prompt = torch.arange(3, 19).repeat(16)[None]
    with torch.inference_mode():
        for _ in range(max(1, steps // 10)):
            session.model(prompt, use_cache=False)


def tune_adapters(session: Session, steps: int) -> None:
    model = get_peft_model(session.model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).train()
    batch = torch.arange(3, 35)[None]
    for _ in range(max(1, steps // 10)):
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()


def train(session: Session, steps: int) -> None:
    batch = torch.arange(3, 35)[None]
    for _ in range(max(1, steps // 10)):
        session.backward([lambda: session.model(input_ids=batch, labels=batch, use_cache=False).loss])
        session.step()


CASES = [
    Case("decode, all streamed", "llama", 55, (DECODE,), decode),
    Case("decode, some streamed", "llama", 80, (DECODE,), decode),
    Case("decode, all resident", "llama", 200, (DECODE,), decode),
    Case("prefill", "llama", 60, (PREFILL,), prefill),
    Case("experts", "qwen3_moe", 60, (DECODE,), decode),
    Case("KV cache in pages", "llama", 70, (DECODE,), decode, lambda folder: {"kv_memory": 1 << 18, "exactness": "rounding"}),
    Case("adapters", "llama", 80, (PREFILL, BACKWARD), tune_adapters, lambda folder: {"training": Training()}),
    Case(
        "all weights, states on NVMe",
        "llama",
        700,
        (PREFILL, BACKWARD),
        train,
        lambda folder: {"training": Training(full=True, state_tier="nvme", state_dir=folder), "disk_dir": folder},
    ),
]


def measured(case: Case, scratch: str) -> dict[str, Any]:
    """One run: microseconds for each block that was asked for."""
    folder = f"{scratch}/{case.family}"
    if not os.path.exists(folder):
        synthesize(folder, MODEL_BYTES, family=case.family)
    with tempfile.TemporaryDirectory(dir=scratch) as disk:
        reserve = {"batch_size": 1, "max_tokens": 300, "device": "cpu", "cpu_memory": case.budget_mib << 20}
        with offload(folder, **reserve, **case.options(disk)) as session:
            case.use(session, 10)
            before = _sums(session, case.phases)
            case.use(session, TOKENS)
            passes, own, between, all_seconds = (
                now - then for now, then in zip(_sums(session, case.phases), before, strict=True)
            )
            weights = session.plan.weights
            streamed, blocks = len(weights.streamed), len(weights.streamed) + len(weights.resident)
    return {
        "streamed": streamed,
        "blocks": blocks,
        "own_us": own / passes / max(1, streamed) * 1e6,
        "own_and_between_us": (own + between) / passes / blocks * 1e6,
        "share": (own + between) / all_seconds,
    }


def _sums(session: Session, phases: tuple[str, ...]) -> tuple[float, float, float, float]:
    times = [session.machine.clock.phases.get(phase, PhaseTimes()) for phase in phases]
    return (
        max(item.passes for item in times),
        sum(item.overhead_seconds for item in times),
        sum(item.other_seconds for item in times),
        sum(item.seconds for item in times),
    )


def wake_microseconds() -> dict[str, float]:
    """What it costs to wake a thread that sleeps, and until it has answered; medians, between products of torch."""
    woken, answered = threading.Condition(), threading.Event()
    asked, costs, trips = [False], [], []

    def serve() -> None:
        for _ in range(_WAKES):
            with woken:
                woken.wait_for(lambda: asked[0])
                asked[0] = False
            answered.set()

    thread = threading.Thread(target=serve)
    thread.start()
    one, other = torch.randn(8, 1024), torch.randn(1024, 1024)
    for _ in range(_WAKES):
        one @ other
        answered.clear()
        begun = time.perf_counter()
        with woken:
            asked[0] = True
            woken.notify()
        costs.append(time.perf_counter() - begun)
        answered.wait()
        trips.append(time.perf_counter() - begun)
        time.sleep(0.001)
    thread.join()
    return {"notify_us": statistics.median(costs) * 1e6, "round_trip_us": statistics.median(trips) * 1e6}


def call_microseconds() -> dict[str, float]:
    """What one small call takes, which asks the kernel for a number: hot, and between two products; medians."""
    one, other = torch.randn(8, 2048), torch.randn(2048, 2048)
    found: dict[str, float] = {}
    for name, between in (("loop", lambda: None), ("products", lambda: one @ other)):
        costs = []
        for _ in range(_WAKES):
            between()
            begun = time.perf_counter()
            anonymous_bytes()
            costs.append(time.perf_counter() - begun)
        found[f"{name}_us"] = statistics.median(costs) * 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", metavar="FILE.json")
    request = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            if request.only not in case.name:
                continue
            rounds = [measured(case, scratch) for _ in range(request.rounds)]
            row = {"name": case.name} | {name: statistics.median(item[name] for item in rounds) for name in rounds[0]}
            rows.append(row)
            where = f"{row['streamed']:3.0f} of {row['blocks']:3.0f} streamed"
            print(
                f"{case.name:28} {where}   own {row['own_us']:6.0f} us a streamed block   "
                f"with what is between {row['own_and_between_us']:6.0f} us a block, {row['share']:.0%} of the time",
                flush=True,
            )
    wake = wake_microseconds()
    call = call_microseconds()
    print(f"a small call: {call['loop_us']:.0f} us in a loop, {call['products_us']:.0f} us between products")
    print(f"to wake a sleeping thread: {wake['notify_us']:.0f} us; until it has answered: {wake['round_trip_us']:.0f} us")
    if request.out:
        machine = {"cpus": os.cpu_count(), "torch_threads": torch.get_num_threads(), "commit": commit()}
        Path(request.out).write_text(
            json.dumps({"machine": machine, "call": call, "wake": wake, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
