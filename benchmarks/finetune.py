"""Claim: fine-tuning streams weights and states at the machine's own speed, in memory that does not hold them.

Each system runs in a process of its own, one after another, in a fresh control group, with the files evicted from the page
cache. Two sections:

- `lora`: adapters on a model twice as large as the group. A step's bound is the larger of computing (plain torch and peft
  with everything in memory and gradient checkpointing, which computes what ours computes) and reading (the bytes that ours
  moves, by raw O_DIRECT reads asked in the way that the disk likes best).
- `full`: all weights in bf16 with fp32 masters and AdamW, weights and states on NVMe. Its bound is the larger of computing
  and of raw reads and writes, both at once, of the bytes that ours moves. `memory` is ours with everything in CPU memory,
  `plain` plain torch with masters, both in all the memory they want; `accelerate` its cpu_offload, which lets a loop run and
  trains nothing.

    python -m benchmarks.finetune --rounds 3 --out benchmarks/results/finetune-cpu.json
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.checkout import commit
from benchmarks.memory_group import MemoryGroup, evict
from benchmarks.raw_disk import beginnings, reads_and_writes, reads_of

WARM_UP = 2
"""Steps that are not counted: the first one makes files and finds nothing learned about the order of blocks."""

SECTIONS = {
    "lora": ("ours", "compute", "raw"),
    "full": ("ours", "memory", "plain", "raw", "accelerate"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora-model", help="a checkpoint folder; by default one is made")
    parser.add_argument("--full-model", help="the same for all weights")
    parser.add_argument("--lora-size", default="2.2GB")
    parser.add_argument("--full-size", default="300MB")
    parser.add_argument("--lora-limit", default="1050MiB", help="of the control group, everything included")
    parser.add_argument("--lora-memory", default="650MiB", help="our budget in it")
    parser.add_argument("--full-limit", default="1500MiB")
    parser.add_argument("--full-memory", default="950MiB")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--disk-rate", help="bytes a second that a group may read, like 1GB (default: what the disk gives)")
    parser.add_argument("--only", choices=tuple(SECTIONS))
    parser.add_argument("--out")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--moved", type=json.loads, default={}, help=argparse.SUPPRESS)
    request = parser.parse_args()
    if request.worker:
        section, system = request.worker.split("-")
        print(json.dumps(WORKERS[section, system](request, getattr(request, f"{section}_model"))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        result: dict[str, Any] = {"machine": machine(), "request": asked(request)}
        for section in [request.only] if request.only else list(SECTIONS):
            if getattr(request, f"{section}_model") is None:
                setattr(request, f"{section}_model", made(f"{scratch}/{section}", getattr(request, f"{section}_size")))
            rounds = [measure_round(request, section, number) for number in range(request.rounds)]
            result[section] = SUMMARIES[section](rounds) | {"rounds": rounds}
            shown = {key: value for key, value in result[section].items() if key != "rounds"}
            print(json.dumps({section: shown}, indent=2), flush=True)
    if request.out:
        Path(request.out).write_text(json.dumps(result, indent=2) + "\n")


def asked(request: argparse.Namespace) -> dict[str, Any]:
    names = ("size", "limit", "memory")
    return {f"{section}_{name}": getattr(request, f"{section}_{name}") for section in SECTIONS for name in names} | {
        name: getattr(request, name) for name in ("tokens", "steps", "rounds", "disk_rate")
    }


def machine() -> dict[str, Any]:
    return {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version(), "commit": commit()}


def made(folder: str, size: str) -> str:
    subprocess.run([sys.executable, "-m", "offload.cli.main", "synth", folder, "--size", size], check=True)
    return folder


def measure_round(request: argparse.Namespace, section: str, number: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for system in SECTIONS[section]:
        moved = {key: figures["ours"][key] for key in ("read_bytes", "written_bytes")} if system == "raw" else {}
        figures[system] = in_group(request, section, system, moved)
        said = {key: value for key, value in figures[system].items() if key not in ("losses", "step_seconds")}
        seconds = figures[system].get("step_seconds")
        print(f"{section} {number} {system}: {median(seconds)} s/step; {said}", file=sys.stderr, flush=True)
    return figures


def in_group(request: argparse.Namespace, section: str, system: str, moved: dict[str, int]) -> dict[str, Any]:
    from offload.config import parse_bytes

    model = getattr(request, f"{section}_model")
    limit = parse_bytes(getattr(request, f"{section}_limit")) if system in ("ours", "raw") else 16 << 30
    command = [sys.executable, "-m", "benchmarks.finetune", "--worker", f"{section}-{system}", f"--{section}-model", model]
    command += ["--tokens", str(request.tokens), "--steps", str(request.steps), "--moved", json.dumps(moved)]
    command += [f"--{section}-memory", getattr(request, f"{section}_memory")]
    evict(model)
    assert limit is not None
    rate = None if request.disk_rate is None else parse_bytes(request.disk_rate)
    with MemoryGroup(limit, rate, model) as group:
        return group.measure(command)


def batch(request: argparse.Namespace, step: int) -> dict[str, Any]:
    import torch

    ids = torch.randint(3, 1000, (1, request.tokens), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def adapted(model: Any) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


def lora_ours(request: argparse.Namespace, folder: str) -> dict[str, Any]:
    from offload import Training, offload

    training = Training(learning_rate=1e-4)
    with offload(folder, device="cpu", cpu_memory=request.lora_memory, training=training, max_tokens=request.tokens) as session:
        return trained(request, session, adapted(session.model).train())


def full_ours(request: argparse.Namespace, folder: str) -> dict[str, Any]:
    from offload import Training, offload

    with tempfile.TemporaryDirectory(dir=os.path.dirname(folder)) as states:
        training = Training(full=True, learning_rate=1e-5, state_tier="nvme", state_dir=states)
        with offload(
            folder, device="cpu", cpu_memory=request.full_memory, training=training, max_tokens=request.tokens
        ) as session:
            return trained(request, session, session.model.train())


def full_memory(request: argparse.Namespace, folder: str) -> dict[str, Any]:
    from offload import Training, offload

    training = Training(full=True, learning_rate=1e-5)
    with offload(folder, device="cpu", cpu_memory="14GiB", training=training, max_tokens=request.tokens) as session:
        return trained(request, session, session.model.train())


def trained(request: argparse.Namespace, session: Any, model: Any) -> dict[str, Any]:
    """Steps of ours, and what each moved."""
    seconds, losses = [], []
    before = (0, 0)
    for step in range(request.steps + WARM_UP):
        if step == WARM_UP:
            before = session.machine.host.reads.bytes_moved, session.machine.host.writes.bytes_moved
        begun = time.perf_counter()
        losses += session.backward([lambda step=step: model(**batch(request, step), use_cache=False).loss])
        # As the command does: what is left of an update is done beside the next forward, and counted with that step.
        session.step(max_grad_norm=1.0, overlap=True)
        seconds.append(time.perf_counter() - begun)
    moved = [
        (now - then) // request.steps
        for now, then in zip(
            (session.machine.host.reads.bytes_moved, session.machine.host.writes.bytes_moved), before, strict=True
        )
    ]
    estimate = session.training_estimate()
    parameters = sum(value.numel() for value in model.parameters() if value.requires_grad)
    report = session.report()
    kinds = ("resident weights", "trained weights", "gradients", "optimizer state")
    held = sum(report.tiers["cpu"].at_peak_bytes.get(kind, 0) for kind in kinds)
    return {
        "step_seconds": seconds[WARM_UP:],
        "read_bytes": moved[0],
        "written_bytes": moved[1],
        "weight_bytes": report.weight_bytes,
        "predicted_step_seconds": estimate.step_seconds,
        "predicted_written_bytes": estimate.written_bytes,
        "trained_parameters": parameters,
        "ledger_peak_bytes": report.tiers["cpu"].peak_bytes,
        "ledger_bytes_a_parameter": held / parameters,
        "resident_blocks": report.blocks["resident"],
        "losses": losses,
    }


def lora_compute(request: argparse.Namespace, folder: str) -> dict[str, Any]:
    """The same, with every parameter in memory of its own."""
    import torch

    model = adapted(in_memory(folder)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return plain_steps(request, model, step)


def full_plain(request: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Plain torch, with fp32 masters."""
    import torch

    model = in_memory(folder).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = list(model.parameters())
    masters = [value.detach().float() for value in parameters]
    optimizer = torch.optim.AdamW(masters, lr=1e-5, weight_decay=0.0, fused=True)

    def step() -> None:
        for master, value in zip(masters, parameters, strict=True):
            master.grad = value.grad.float()
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, value in zip(masters, parameters, strict=True):
                value.copy_(master)
                master.grad = None

    return plain_steps(request, model, step)


def in_memory(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def plain_steps(request: argparse.Namespace, model: Any, update: Any) -> dict[str, Any]:
    seconds, updates, losses = [], [], []
    for step in range(request.steps + WARM_UP):
        begun = time.perf_counter()
        loss = model(**batch(request, step), use_cache=False).loss
        loss.backward()
        middle = time.perf_counter()
        update()
        model.zero_grad()
        seconds.append(time.perf_counter() - begun)
        updates.append(time.perf_counter() - middle)
        losses.append(loss.item())
    return {"step_seconds": seconds[WARM_UP:], "update_seconds": median(updates[WARM_UP:]), "losses": losses}


def raw_lora(request: argparse.Namespace, folder: str) -> dict[str, Any]:
    return reads_of(beginnings(folder, request.moved["read_bytes"]))


def raw_full(request: argparse.Namespace, folder: str) -> dict[str, Any]:
    return reads_and_writes(os.path.dirname(folder), request.moved["read_bytes"], request.moved["written_bytes"])


def full_accelerate(request: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Its cpu_offload, in a loop as one would write it."""
    import torch
    from accelerate import cpu_offload
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").train()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    cpu_offload(model, execution_device=torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, error = [], None
    try:
        for _ in range(3):
            loss = model(**batch(request, 0), use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    except RuntimeError as failure:
        error = str(failure).splitlines()[0]
    after = model.state_dict()
    held = {name: value for name, value in after.items() if not value.is_meta and name in before}
    changed = sum(not torch.equal(value, before[name]) for name, value in held.items())
    return {"losses": losses, "error": error, "parameters": len(before), "parameters_changed": changed}


WORKERS = {
    ("lora", "ours"): lora_ours,
    ("lora", "compute"): lora_compute,
    ("lora", "raw"): raw_lora,
    ("full", "ours"): full_ours,
    ("full", "memory"): full_memory,
    ("full", "plain"): full_plain,
    ("full", "raw"): raw_full,
    ("full", "accelerate"): full_accelerate,
}


def median(values: list[float] | None) -> float | None:
    return statistics.median(values) if values else None


def summary_of_lora(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    ratios, bounds = [], []
    for item in rounds:
        compute = statistics.median(item["compute"]["step_seconds"])
        reading = item["ours"]["read_bytes"] / item["raw"]["bytes_per_second"]
        bounds.append(max(compute, reading))
        ratios.append(statistics.median(item["ours"]["step_seconds"]) / bounds[-1])
    return {
        "step_seconds": statistics.median(statistics.median(item["ours"]["step_seconds"]) for item in rounds),
        "compute_seconds": statistics.median(statistics.median(item["compute"]["step_seconds"]) for item in rounds),
        "bound_seconds": statistics.median(bounds),
        "ours_over_bound": statistics.median(ratios),
        "by_round": ratios,
        "weight_bytes": rounds[0]["ours"]["weight_bytes"],
        "read_bytes": rounds[0]["ours"]["read_bytes"],
        "written_bytes": rounds[0]["ours"]["written_bytes"],
        "peak_anonymous_bytes": max(item["ours"]["peak_anonymous_bytes"] for item in rounds),
        "same_losses": all(item["ours"]["losses"] == item["compute"]["losses"] for item in rounds),
    }


def summary_of_full(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = []
    for item in rounds:
        ours, raw = item["ours"], item["raw"]
        compute = statistics.median(item["plain"]["step_seconds"])
        moving = (ours["read_bytes"] + ours["written_bytes"]) / raw["both_bytes_per_second"]
        ratios.append(statistics.median(ours["step_seconds"]) / max(compute, moving))
    first = rounds[0]["ours"]
    return {
        "step_seconds": statistics.median(statistics.median(item["ours"]["step_seconds"]) for item in rounds),
        "plain_seconds": statistics.median(statistics.median(item["plain"]["step_seconds"]) for item in rounds),
        "memory_seconds": statistics.median(statistics.median(item["memory"]["step_seconds"]) for item in rounds),
        "memory_bytes_a_parameter": rounds[0]["memory"]["ledger_bytes_a_parameter"],
        "memory_peak_anonymous_bytes": max(item["memory"]["peak_anonymous_bytes"] for item in rounds),
        "ours_over_bound": statistics.median(ratios),
        "by_round": ratios,
        "read_bytes": first["read_bytes"],
        "written_bytes": first["written_bytes"],
        "predicted_written_bytes": first["predicted_written_bytes"],
        "trained_parameters": first["trained_parameters"],
        "peak_anonymous_bytes": max(item["ours"]["peak_anonymous_bytes"] for item in rounds),
        "plain_peak_anonymous_bytes": max(item["plain"]["peak_anonymous_bytes"] for item in rounds),
        "same_losses": all(item["ours"]["losses"] == item["plain"]["losses"] for item in rounds),
        "accelerate": {
            key: rounds[0]["accelerate"].get(key) for key in ("losses", "error", "parameters", "parameters_changed", "failed")
        },
    }


SUMMARIES = {"lora": summary_of_lora, "full": summary_of_full}


if __name__ == "__main__":
    main()
