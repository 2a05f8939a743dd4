"""Claims: caching single experts beats streaming whole layers, and the cache's policies do what they are chosen for.

`--traces DIR` replays recorded routings (`*.csv`, see docs/experts.md) at 12, 16 and 32 slots a layer, and prints hits and
copies over the second half of each beside an all-knowing cache.

Besides, a small model is trained for a few minutes, since random weights route too evenly to mean anything: byte by byte
on Python's own sources, 32 experts of which a token uses 4. It then decodes from disk with a quarter of its experts in
memory, in each round one after another, each in a fresh control group with its files evicted from the page cache:

- `experts`: offload, single experts; `experts-prefetch`: with the next layer's router asked early;
- `layers`: offload, whole layers, in the same budget;
- `accelerate`: its disk offload, with a quarter of the layers in memory;
- `resident`: transformers with all the memory that it wants.

    python -m benchmarks.experts --traces DIR --rounds 3 --out benchmarks/results/experts-cpu.json
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.memory_group import MemoryGroup, evict

MIB = 1 << 20
SYSTEMS = ("experts", "experts-prefetch", "layers", "accelerate", "resident")
LAYERS, EXPERTS, CHOSEN, HIDDEN, INTERMEDIATE = 4, 32, 4, 256, 512
SLOTS = (12, 16, 32)
PROMPT_BYTES = 64
BESIDE_BYTES = 90 * MIB
"""Of the control group, above what a process with torch holds and the budget: stacks, kernels, a little page cache."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", help="a folder with routing traces to replay")
    parser.add_argument("--only", choices=("replay", "speed"), help="one of the two claims")
    parser.add_argument("--model", help="a folder with a model that this trained before; by default one is trained")
    parser.add_argument("--train-seconds", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out")
    parser.add_argument("--worker", choices=(*SYSTEMS, "nothing"), help=argparse.SUPPRESS)
    request = parser.parse_args()
    if request.worker:
        print(json.dumps(run_worker(request)))
        return
    machine = {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
    result: dict[str, Any] = {"machine": machine}
    if request.traces and request.only != "speed":
        result["replay"] = [compared(path) for path in sorted(Path(request.traces).glob("*.csv"))]
        for table in result["replay"]:
            show_replay(table)
    if request.only != "replay":
        with tempfile.TemporaryDirectory() as scratch:
            folder = request.model or f"{scratch}/model"
            if not Path(folder, "config.json").exists():
                Path(folder).mkdir(exist_ok=True)
                Path(folder, "training.json").write_text(json.dumps(train(folder, request.train_seconds)))
            result["training"] = json.loads(Path(folder, "training.json").read_text())
            request.model = folder
            result["speed"] = speed(request)
        show_speed(result["speed"])
    if request.out:
        Path(request.out).write_text(json.dumps(result, indent=2) + "\n")


def compared(path: Path) -> dict[str, Any]:
    """Of one trace: every policy at every number of slots, each layer with as many for itself."""
    from offload.scheduler.expert_replay import POLICIES, replay
    from offload.scheduler.routing import Routing

    routing = Routing.load(path)
    rows = []
    for slots in SLOTS:
        warm = {name: replay(routing, name, slots * routing.layers, "layer").warm for name in POLICIES}
        row = {name: {"hits": tally.hit_rate, "copies": tally.copies, "choices": tally.choices} for name, tally in warm.items()}
        best = max(row[name]["hits"] for name in ("lru", "lfu", "admission"))
        rows.append(
            {
                "slots": slots,
                **row,
                "loaded_below_best": best - row["lfu"]["hits"],
                "admission_copies_over_lru": row["admission"]["copies"] / row["lru"]["copies"],
                "admission_hits_less_lru": row["admission"]["hits"] - row["lru"]["hits"],
            }
        )
    return {"trace": path.stem, "rows": rows}


def show_replay(table: dict[str, Any]) -> None:
    for row in table["rows"]:
        rates = ", ".join(f"{name} {row[name]['hits']:.1%}" for name in ("lru", "lfu", "admission", "belady"))
        print(
            f"{table['trace']}, {row['slots']} slots a layer: {rates}; misses loaded (lfu): "
            f"{100 * row['loaded_below_best']:.1f} points below the best; misses on the CPU (admission): "
            f"{row['admission_copies_over_lru']:.2f} of LRU's copies, {100 * row['admission_hits_less_lru']:+.1f} points"
        )


def train(folder: str, seconds: int) -> dict[str, Any]:
    """A byte-level mixture of experts, for so long."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN, norm_topk_prob=True, max_position_embeddings=1024, tie_word_embeddings=True,
        output_router_logits=True, router_aux_loss_coef=0.001, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    text = training_text()
    begun, losses = time.perf_counter(), []
    while time.perf_counter() - begun < seconds:
        starts = torch.randint(0, len(text) - 129, (12,)).tolist()
        batch = torch.stack([text[start : start + 129] for start in starts]).long()
        output = model(input_ids=batch[:, :-1], labels=batch[:, :-1])
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    model.eval().to(torch.bfloat16).save_pretrained(folder)
    print(f"trained {len(losses)} steps: loss {losses[0]:.2f} -> {statistics.mean(losses[-10:]):.2f}", file=sys.stderr)
    return {"steps": len(losses), "first_loss": losses[0], "last_loss": statistics.mean(losses[-10:])}


def training_text() -> Any:
    """Python's own sources, as bytes."""
    import torch

    library = Path(sysconfig.get_paths()["stdlib"])
    content = b"\n".join(path.read_bytes() for path in sorted(library.glob("*.py")))
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def speed(request: argparse.Namespace) -> dict[str, Any]:
    budget = budget_bytes(request.model)
    base = in_group(request, "nothing", 4 << 30)["process_bytes"]
    limit = base + budget + BESIDE_BYTES
    rounds = []
    for number in range(request.rounds):
        order = SYSTEMS if number % 2 == 0 else SYSTEMS[::-1]
        figures = {name: in_group(request, name, 16 << 30 if name == "resident" else limit) for name in order}
        rounds.append(figures)
        failed = {name: item for name, item in figures.items() if "token_seconds" not in item}
        if failed:
            raise SystemExit(f"round {number}: no figures of {failed}")
        told = {name: f"{1e3 * statistics.median(item['token_seconds']):.1f} ms" for name, item in figures.items()}
        print(f"round {number}: {told}", file=sys.stderr, flush=True)
    medians = {name: statistics.median(statistics.median(item[name]["token_seconds"]) for item in rounds) for name in SYSTEMS}
    ratios = {
        f"{name}_over_experts": statistics.median(
            statistics.median(item[name]["token_seconds"]) / statistics.median(item["experts"]["token_seconds"])
            for item in rounds
        )
        for name in SYSTEMS[1:]
    }
    return {"budget_bytes": budget, "limit_bytes": limit, "seconds_per_token": medians, **ratios, "rounds": rounds}


def budget_bytes(folder: str) -> int:
    """Of a session that has slots for a quarter of the experts."""
    from dataclasses import replace

    from offload.budgets import Budgets
    from offload.model.loading import CheckpointLoader
    from offload.planning.describe import count_activations
    from offload.planning.fit import Demand, ExpertGranularity, fit
    from offload.scheduler.model_spec import Workload

    loader = CheckpointLoader(folder)
    model = loader.outline()
    assert model is not None
    workload = Workload(1, 256, 256)
    decision = fit(
        model,
        Budgets(1 << 40, None),
        workload,
        loader.size_of,
        count_activations(model, workload),
        Demand(ExpertGranularity.PER_EXPERT),
    )
    plan = decision.plan
    return replace(plan, experts=replace(plan.experts, slots=LAYERS * EXPERTS // 4)).device_bytes


def in_group(request: argparse.Namespace, system: str, limit: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.experts", "--worker", system, "--model", request.model]
    command += ["--tokens", str(request.tokens)]
    evict(request.model)
    with MemoryGroup(limit) as group:
        return group.measure(command)


def run_worker(request: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    if request.worker == "nothing":
        from offload.storage.process_memory import process_bytes

        # What every system has in memory before it begins: the libraries, ours included, and the model's code.
        for name in ("offload.session.opening", "transformers.models.qwen3_moe.modeling_qwen3_moe"):
            importlib.import_module(name)

        return {"process_bytes": process_bytes()}
    if request.worker.startswith(("experts", "layers")):
        return ours(request)
    from transformers import AutoModelForCausalLM

    if request.worker == "resident":
        model = AutoModelForCausalLM.from_pretrained(request.model, dtype="auto")
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return timed(model, request.tokens)
    places = {f"model.layers.{index}": "cpu" if index < LAYERS // 4 else "disk" for index in range(LAYERS)}
    places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    with tempfile.TemporaryDirectory(dir=Path(request.model).parent) as folder:
        model = AutoModelForCausalLM.from_pretrained(request.model, device_map=places, offload_folder=folder, dtype="auto")
        return timed(model, request.tokens)


def ours(request: argparse.Namespace) -> dict[str, Any]:
    from offload import offload

    options: dict[str, Any] = {
        "expert_policy": "layers" if request.worker == "layers" else "auto",
        "expert_prefetch": "on" if request.worker == "experts-prefetch" else "off",
    }
    budget = budget_bytes(request.model)
    with offload(request.model, device="cpu", cpu_memory=budget, max_tokens=256, **options) as session:
        figures = timed(session.model, request.tokens)
        report = session.report()
        return figures | {
            "experts": None if report.experts is None else report.to_dict()["experts"],
            "disk_bytes": report.links["disk"].bytes,
            "decode": report.to_dict()["decode"],
            "fallbacks": report.fallbacks,
        }


def timed(model: Any, tokens: int) -> dict[str, Any]:
    """Seconds of each decode step over text of the kind that the model was made for: the same bytes for every system."""
    import torch

    text = training_text()[5000 : 5000 + PROMPT_BYTES + tokens].long()[None]
    seconds = []
    with torch.inference_mode():
        cache = model(text[:, :PROMPT_BYTES], use_cache=True).past_key_values
        for at in range(PROMPT_BYTES, PROMPT_BYTES + tokens):
            begun = time.perf_counter()
            cache = model(text[:, at : at + 1], past_key_values=cache, use_cache=True).past_key_values
            seconds.append(time.perf_counter() - begun)
    return {"token_seconds": seconds}


def show_speed(result: dict[str, Any]) -> None:
    for name, seconds in result["seconds_per_token"].items():
        print(f"{name}: {1e3 * seconds:.1f} ms a token")
    for name in SYSTEMS[1:]:
        print(f"{name} takes {result[f'{name}_over_experts']:.2f} times as long as experts")
    for name in ("experts", "experts-prefetch"):
        use = result["rounds"][0][name]["experts"]
        if use:
            compared = use["belady"]
            print(
                f"{name}: {compared['measured_hits'] / compared['choices']:.1%} of what was asked for was there; "
                f"an offline-optimal cache "
                f"{compared['hits'] / compared['choices']:.1%}; recall {use['recall'] or 0:.0%}, "
                f"by twice as many names {use['recall_at_2k'] or 0:.0%}"
            )


if __name__ == "__main__":
    main()
