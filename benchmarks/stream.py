"""Claim: weights stream at nearly the disk's own speed, and generation is as fast as that allows.

Makes (or takes) a checkpoint, and in each round runs, one after another, in another order each time, each in a fresh control
group with the files evicted from the page cache, and with the disk held at a rate if one is given:

- `ours`: offload, the report's figures included;
- `raw`: O_DIRECT reads of exactly the ranges that ours streams in a pass with nothing else to do, as many at once and as large
  as the disk likes best;
- `accelerate`: its disk offload, with as many layers kept in memory as ours keeps (`accelerate-all-disk`: none), in memory of
  their own and not in maps of the files, which the kernel may take away;
- `plain`: transformers without any offloading, which pages through the memory map;
- `resident`: transformers with all the memory it wants: what computing alone takes.

    python -m benchmarks.stream --out benchmarks/results/stream-cpu.json
    python -m benchmarks.stream --disk-rate 1GB --out benchmarks/results/stream-cpu-held.json
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
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.checkout import commit
from benchmarks.memory_group import MemoryGroup, evict

MIB = 1 << 20
PROMPT_TOKENS = 16
SYSTEMS = ("ours", "raw", "accelerate", "accelerate-all-disk", "plain", "resident")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder; by default one is made")
    parser.add_argument("--size", default="2.2GB", help="of the model that is made (default: 2.2GB)")
    parser.add_argument("--cpu-memory", default="1000MiB", help="our budget, and what accelerate may keep in memory")
    parser.add_argument("--limit", default="1500MiB", help="of the control group")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=11, help="of which all but the first are decode steps (default: 11)")
    parser.add_argument("--disk-rate", help="bytes a second that a group may read, like 1GB (default: what the disk gives)")
    parser.add_argument("--out")
    parser.add_argument("--worker", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--ranges", help=argparse.SUPPRESS)
    parser.add_argument("--resident", type=int, default=0, help=argparse.SUPPRESS)
    request = parser.parse_args()
    if request.worker:
        print(json.dumps(WORKERS[request.worker](request)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        if request.model is None:
            request.model = f"{scratch}/model"
            subprocess.run(
                [sys.executable, "-m", "offload.cli.main", "synth", request.model, "--size", request.size], check=True
            )
        # Told once what ours streams and keeps, so that no system has to go first.
        ours = in_group(request, "ours", "", 0)
        ranges = f"{scratch}/ranges.json"
        Path(ranges).write_text(json.dumps(ours["ranges"]))
        measure = partial(measure_round, request, ranges, ours["resident_layers"])
        result = summarise(request, [measure(number) for number in range(request.rounds)])
    print(json.dumps(result["summary"], indent=2))
    if request.out:
        Path(request.out).write_text(json.dumps(result, indent=2) + "\n")


def measure_round(request: argparse.Namespace, ranges: str, resident: int, number: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    begin = number % len(SYSTEMS)
    for system in (*SYSTEMS[begin:], *SYSTEMS[:begin]):
        figures[system] = in_group(request, system, ranges, resident)
        figures[system].pop("ranges", None)
        print(f"round {number} {system}: {short(figures[system])}", file=sys.stderr, flush=True)
    return figures


def in_group(request: argparse.Namespace, system: str, ranges: str, resident: int) -> dict[str, Any]:
    from offload.config import parse_bytes

    limit = parse_bytes(request.limit) if system != "resident" else 16 << 30
    command = [sys.executable, "-m", "benchmarks.stream", "--worker", system, "--model", request.model]
    command += [
        "--cpu-memory",
        request.cpu_memory,
        "--tokens",
        str(request.tokens),
        "--ranges",
        ranges,
        "--resident",
        str(resident),
    ]
    if system == "resident":
        for path in Path(request.model).glob("*.safetensors"):
            path.read_bytes()
    else:
        evict(request.model)
    assert limit is not None
    rate = None if request.disk_rate is None else parse_bytes(request.disk_rate)
    with MemoryGroup(limit, rate, request.model) as group:
        return group.measure(command)


def ours(request: argparse.Namespace) -> dict[str, Any]:
    from offload import offload

    with offload(
        request.model, device="cpu", cpu_memory=request.cpu_memory, max_tokens=PROMPT_TOKENS + request.tokens
    ) as session:
        seconds = token_seconds(session.model, request.tokens)
        report = session.report()
        blocks = session._parts.residency.placement.streamed.values()
        reads = [
            (read.path, read.file_offset, read.nbytes) for block in blocks for read in block.source._load_plan.read_plan.reads
        ]
        return {
            "token_seconds": seconds,
            "streamed_bytes": report.streamed_bytes_per_pass,
            "weight_bytes": report.weight_bytes,
            "resident_layers": sum(".layers." in key for key in session.plan.weights.resident),
            "ranges": reads,
            "report": report.to_dict(),
        }


def raw(request: argparse.Namespace) -> dict[str, Any]:
    """What the disk gives, asked in the way that it likes best."""
    from benchmarks.raw_disk import reads_of

    return reads_of([tuple(item) for item in json.loads(Path(request.ranges).read_text())])


def accelerate(request: argparse.Namespace) -> dict[str, Any]:
    return {"token_seconds": token_seconds(_accelerated(request, request.resident), request.tokens)}


def accelerate_all_disk(request: argparse.Namespace) -> dict[str, Any]:
    return {"token_seconds": token_seconds(_accelerated(request, 0), request.tokens)}


def _accelerated(request: argparse.Namespace, resident: int) -> Any:
    model, folder = accelerated(request.model, resident)
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.clone()
    folder.cleanup()
    return model


def accelerated(folder: str, resident: int) -> tuple[Any, tempfile.TemporaryDirectory[str]]:
    """A model as accelerate offloads it to disk, with so many layers in memory; and its folder, empty for safetensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    layers = AutoConfig.from_pretrained(folder).num_hidden_layers
    places = {f"model.layers.{index}": "cpu" if index < resident else "disk" for index in range(layers)}
    places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    scratch = tempfile.TemporaryDirectory()
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=scratch.name, dtype="auto")
    return model, scratch


def plain(request: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    return {"token_seconds": token_seconds(AutoModelForCausalLM.from_pretrained(request.model, dtype="auto"), request.tokens)}


def resident(request: argparse.Namespace) -> dict[str, Any]:
    """With every parameter in aligned memory of its own."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(request.model, dtype="auto")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return {"token_seconds": token_seconds(model, request.tokens)}


def token_seconds(model: Any, tokens: int) -> list[float]:
    """Seconds of each decode step."""
    moments = token_moments(model, PROMPT_TOKENS, tokens)
    return [second - first for first, second in zip(moments, moments[1:], strict=False)]


def token_moments(model: Any, prompt: int, tokens: int) -> list[float]:
    """When each token was there; the first ends the prefill."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    moments: list[float] = []

    class Stamp(BaseStreamer):
        def put(self, value: Any) -> None:
            moments.append(time.perf_counter())

        def end(self) -> None:
            pass

    ids = torch.randint(3, 1000, (1, prompt), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=Stamp())
    # The first one is the prompt's.
    return moments[1:]


WORKERS = {
    "ours": ours,
    "raw": raw,
    "accelerate": accelerate,
    "accelerate-all-disk": accelerate_all_disk,
    "plain": plain,
    "resident": resident,
}


def short(figures: dict[str, Any]) -> str:
    if "failed" in figures:
        return str(figures["failed"])
    if "token_seconds" in figures:
        return f"{statistics.median(figures['token_seconds']):.3f} s/token"
    return f"{figures['bytes_per_second'] / 1e9:.2f} GB/s"


def summarise(request: argparse.Namespace, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    def seconds(system: str) -> list[float]:
        return [statistics.median(item[system]["token_seconds"]) for item in rounds if "token_seconds" in item[system]]

    first = rounds[0]["ours"]
    streamed, weights = first["streamed_bytes"], first["weight_bytes"]
    ratios, bounds = [], []
    for item in rounds:
        compute = statistics.median(item["resident"]["token_seconds"])
        fetch = streamed / item["raw"]["bytes_per_second"]
        bounds.append(max(fetch, compute))
        ratios.append(statistics.median(item["ours"]["token_seconds"]) / bounds[-1])
    medians = {system: statistics.median(seconds(system)) for system in SYSTEMS if system != "raw" and seconds(system)}
    best_accelerate = min((medians[name] for name in ("accelerate", "accelerate-all-disk") if name in medians), default=None)
    summary = {
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
        "commit": commit(),
        "request": {key: getattr(request, key) for key in ("size", "cpu_memory", "limit", "rounds", "tokens", "disk_rate")},
        "weight_bytes": weights,
        "streamed_bytes": streamed,
        "seconds_per_token": medians,
        "raw_bytes_per_second": statistics.median(item["raw"]["bytes_per_second"] for item in rounds),
        "ours_over_bound": statistics.median(ratios),
        "bound_seconds": statistics.median(bounds),
        "accelerate_over_ours": best_accelerate / medians["ours"] if best_accelerate else None,
        "peak_anonymous_bytes": max(item["ours"]["peak_anonymous_bytes"] for item in rounds),
    }
    return {"summary": summary, "rounds": rounds}


if __name__ == "__main__":
    main()
