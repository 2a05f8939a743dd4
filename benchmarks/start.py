"""Claim: from nothing to the first token takes what imports and one reading of the weights take.

Each system runs as a process of its own in a fresh control group, one after another, in another order each time, with the
checkpoint evicted from the page cache. Counted from the start of the process: to the first token, and to the eleventh.

- `ours`: offload; also when imports were over, when the session was entered, and how long entering once more takes;
- `raw`: O_DIRECT reads of all weights, asked in the way that the disk likes best;
- `accelerate`: its disk offload with as many layers in memory as ours keeps, `accelerate-all-disk` with none: loaded as people
  load them, from maps of the files;
- `plain`: transformers without any offloading;
- `llama-cpp`: llama.cpp with the same weights as a GGUF in BF16, mapped, where `--llama-cpp` names a folder with its packages
  (`pip install --no-deps --target FOLDER xllamacpp gguf`);
- `resident`: transformers with all the memory it wants: what computing alone takes.
- `imports`: what ours has to import for this model, and nothing else.

    python -m benchmarks.start --rounds 5 --out benchmarks/results/start-cpu.json
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.checkout import commit
from benchmarks.llama_cpp import to_gguf
from benchmarks.memory_group import MemoryGroup, evict
from benchmarks.stream import accelerated, token_moments

SYSTEMS = ("ours", "raw", "accelerate", "accelerate-all-disk", "plain", "llama-cpp", "resident", "imports")
NEW_TOKENS = 11


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder; by default one is made")
    parser.add_argument("--size", default="2.2GB", help="of the model that is made (default: 2.2GB)")
    parser.add_argument("--cpu-memory", default="1000MiB", help="our budget, and what accelerate may keep in memory")
    parser.add_argument("--limit", default="1500MiB", help="of the control group")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 1024], help="tokens (default: 16 1024)")
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--disk-rate", help="bytes a second that a group may read, like 1GB (default: what the disk gives)")
    parser.add_argument("--llama-cpp", help="a folder with the packages xllamacpp and gguf (default: it is left out)")
    parser.add_argument("--out")
    parser.add_argument("--worker", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--prompt", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--resident", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--gguf", default="", help=argparse.SUPPRESS)
    request = parser.parse_args()
    if request.worker:
        print(json.dumps(WORKERS[request.worker](request)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        if request.model is None:
            request.model = f"{scratch}/model"
            command = [sys.executable, "-m", "offload.cli.main", "synth", request.model, "--size", request.size]
            subprocess.run(command, check=True)
        request.only = [system for system in request.only if system != "llama-cpp" or request.llama_cpp]
        if "llama-cpp" in request.only:
            os.mkdir(f"{scratch}/gguf")
            request.gguf = f"{scratch}/gguf/model.gguf"
            to_gguf(request.model, request.gguf, request.llama_cpp)
        os.environ["OFFLOAD_PROFILES"] = profile_alone(scratch)
        first = in_group(request, "ours", request.prompts[0])
        print(f"the first time ever, when nothing is kept of an earlier run: {first}", file=sys.stderr, flush=True)
        request.resident = first["resident_layers"]
        rounds = [round_of(request, number) for number in range(request.rounds)]
    result = {
        "machine": {"cpus": os.cpu_count(), "python": sys.version.split()[0], "commit": commit()},
        "request": {key: getattr(request, key) for key in ("size", "cpu_memory", "limit", "rounds", "disk_rate")},
        "summary": {str(prompt): summary_of([item[prompt] for item in rounds]) for prompt in request.prompts},
        "rounds": rounds,
    }
    print(json.dumps(result["summary"], indent=2))
    if request.out:
        Path(request.out).write_text(json.dumps(result, indent=2) + "\n")


def profile_alone(scratch: str) -> str:
    """A cache of ours with the profile of this machine, and nothing else that an earlier run kept."""
    from offload.storage.cache_folder import cache_folder

    folder = f"{scratch}/cache"
    os.mkdir(folder)
    for path in cache_folder().glob("hardware-*.json"):
        shutil.copy(path, folder)
    return folder


def round_of(request: argparse.Namespace, number: int) -> dict[int, dict[str, Any]]:
    figures: dict[int, dict[str, Any]] = {}
    begin = number % len(request.only)
    for prompt in request.prompts:
        figures[prompt] = {}
        for system in (*request.only[begin:], *request.only[:begin]):
            found = figures[prompt][system] = in_group(request, system, prompt)
            print(f"round {number} {prompt} {system}: {found}", file=sys.stderr, flush=True)
    return figures


def in_group(request: argparse.Namespace, system: str, prompt: int) -> dict[str, Any]:
    # Not above: a measured process imports what its system needs, and nothing of ours.
    from offload.config import parse_bytes

    limit = parse_bytes(request.limit) if system != "resident" else 16 << 30
    command = [sys.executable, "-m", "benchmarks.start", "--worker", system, "--model", request.model, "--prompt", str(prompt)]
    command += ["--cpu-memory", request.cpu_memory, "--resident", str(request.resident)]
    if system == "llama-cpp":
        command += ["--llama-cpp", request.llama_cpp, "--gguf", request.gguf]
    if system == "resident":
        for path in Path(request.model).glob("*.safetensors"):
            path.read_bytes()
    else:
        evict(request.model)
        if request.gguf:
            evict(os.path.dirname(request.gguf))
    assert limit is not None
    with MemoryGroup(limit, parse_bytes(request.disk_rate), request.model) as group:
        begun = time.perf_counter()
        found = group.measure(command)
    # The clock is the system's: it counts the same in every process.
    moments = {name: round(moment - begun, 3) for name, moment in found.pop("moments", {}).items()}
    return moments | found


def ours(request: argparse.Namespace) -> dict[str, Any]:
    from offload import offload

    moments = {"imported": time.perf_counter()}
    reserve = {"max_tokens": request.prompt + NEW_TOKENS, "new_tokens": NEW_TOKENS}
    with offload(request.model, device="cpu", cpu_memory=request.cpu_memory, **reserve) as session:
        moments["entered"] = time.perf_counter()
        moments |= tokens(session.model, request.prompt)
        layers = sum(".layers." in key for key in session.plan.weights.resident)
        faults = major_faults()
    begun = time.perf_counter()
    with offload(request.model, device="cpu", cpu_memory=request.cpu_memory, **reserve):
        again = time.perf_counter() - begun
    return {
        "moments": moments,
        "enter_again_seconds": again,
        "resident_layers": layers,
        "major_faults": faults,
    }


def raw(request: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.raw_disk import beginnings, reads_of

    return reads_of(beginnings(request.model, 1 << 50))


def accelerate(request: argparse.Namespace) -> dict[str, Any]:
    return _accelerated(request, request.resident)


def accelerate_all_disk(request: argparse.Namespace) -> dict[str, Any]:
    return _accelerated(request, 0)


def _accelerated(request: argparse.Namespace, resident: int) -> dict[str, Any]:
    model, folder = accelerated(request.model, resident)
    with folder:
        return {"moments": tokens(model, request.prompt), "major_faults": major_faults()}


def plain(request: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(request.model, dtype="auto")
    return {"moments": tokens(model, request.prompt), "major_faults": major_faults()}


def llama_cpp(request: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.llama_cpp import token_moments as moments_of

    moments = moments_of(request.gguf, request.llama_cpp, request.prompt, NEW_TOKENS)
    return {"moments": {"first": moments[0], "last": moments[-1]}, "major_faults": major_faults()}


def resident(request: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(request.model, dtype="auto")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    tokens(model, request.prompt)
    begun = time.perf_counter()
    moments = tokens(model, request.prompt)
    return {"compute_seconds": {name: moment - begun for name, moment in moments.items()}}


def imports(request: argparse.Namespace) -> dict[str, Any]:
    import transformers.models.llama.modeling_llama

    import offload.session.opening

    assert offload
    assert transformers
    return {"moments": {"imported": time.perf_counter()}}


def tokens(model: Any, prompt: int) -> dict[str, float]:
    """When the first token was there, and the last."""
    moments = token_moments(model, prompt, NEW_TOKENS)
    return {"first": moments[0], "last": moments[-1]}


def major_faults() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


WORKERS = {
    "ours": ours,
    "raw": raw,
    "accelerate": accelerate,
    "accelerate-all-disk": accelerate_all_disk,
    "plain": plain,
    "llama-cpp": llama_cpp,
    "resident": resident,
    "imports": imports,
}


def summary_of(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of each system's moments."""

    def median(system: str, name: str) -> float | None:
        values = [item[system][name] for item in rounds if name in item.get(system, {})]
        return statistics.median(values) if values else None

    found: dict[str, Any] = {}
    for system in rounds[0]:
        names = ("imported", "entered", "first", "last", "enter_again_seconds", "bytes_per_second", "major_faults")
        found[system] = {name: value for name in names if (value := median(system, name)) is not None}
    return found


if __name__ == "__main__":
    main()
