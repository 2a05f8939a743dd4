"""Claim: where the disk is what is waited for, small bytes are as many times as fast as they are fewer.

Each form of the same model runs as a process of its own in a fresh control group, one after another, in another order each
time, its files evicted from the page cache; the disk may be held. `bf16` in the same budget is what each is compared with.

    python -m benchmarks.codecs --rounds 5 --disk-rate 1GB [--gguf FOLDER] [--out FILE.json]

GGUF files are made where `--gguf` names a folder with the package (`pip install --no-deps --target FOLDER gguf`).
"""

import argparse
import json
import os
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
from benchmarks.stream import token_moments

BUDGETS = {"600MiB": ("bf16", "int8", "Q8_0"), "350MiB": ("bf16", "int4", "nf4", "Q4_0")}
BESIDE_MIB = 450
"""What the process takes beside its budget: Python, torch, and the page cache."""
PROMPT, NEW_TOKENS = 16, 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a plain checkpoint's folder; by default one is made")
    parser.add_argument("--size", default="2.2GB", help="of the model that is made (default: 2.2GB)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--disk-rate", help="bytes a second that a group may read, like 1GB (default: what the disk gives)")
    parser.add_argument("--gguf", help="a folder with the package gguf (default: its forms are left out)")
    parser.add_argument("--out")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--form", help=argparse.SUPPRESS)
    parser.add_argument("--budget", help=argparse.SUPPRESS)
    parser.add_argument("--kept", help=argparse.SUPPRESS)
    request = parser.parse_args()
    if request.worker:
        print(json.dumps(worker(request)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        places = prepared(request, Path(scratch))
        cases = [(budget, form) for budget, forms in BUDGETS.items() for form in forms if form in places]
        rounds = []
        for number in range(request.rounds):
            begin = number % len(cases)
            found = {}
            for budget, form in (*cases[begin:], *cases[:begin]):
                found[f"{form} in {budget}"] = figures = in_group(request, places[form], form, budget)
                print(f"round {number} {form} in {budget}: {figures}", file=sys.stderr, flush=True)
            rounds.append(found)
    summary = {f"{form} in {budget}": summary_of(rounds, form, budget) for budget, form in cases}
    print(json.dumps(summary, indent=1))
    if request.out:
        asked = {"size": request.size, "disk_rate": request.disk_rate, "rounds": request.rounds}
        machine = {"cpus": os.cpu_count(), "commit": commit()}
        content = {"machine": machine, "request": asked, "summary": summary, "rounds": rounds}
        Path(request.out).write_text(json.dumps(content, indent=1) + "\n")


def prepared(request: argparse.Namespace, scratch: Path) -> dict[str, tuple[str, str]]:
    """Where each form is: the checkpoint, and the folder of what is encoded."""
    model = request.model
    if model is None:
        model = str(scratch / "model")
        subprocess.run([sys.executable, "-m", "offload.cli.main", "synth", model, "--size", request.size], check=True)
    places = {"bf16": (model, "")}
    for form in ("int8", "int4", "nf4"):
        kept = scratch / form
        kept.mkdir()
        places[form] = model, str(kept)
        command = [sys.executable, "-m", "benchmarks.codecs", "--worker", "yes", "--form", form, "--budget", "3GiB"]
        subprocess.run([*command, "--model", model, "--kept", str(kept)], check=True, capture_output=True)
    for kind in ("Q8_0", "Q4_0") if request.gguf else ():
        folder = scratch / kind
        folder.mkdir()
        to_gguf(model, str(folder / "model.gguf"), request.gguf, kind)
        places[kind] = str(folder / "model.gguf"), ""
    return places


def in_group(request: argparse.Namespace, place: tuple[str, str], form: str, budget: str) -> dict[str, Any]:
    from offload.config import parse_bytes

    model, kept = place
    for folder in {os.path.dirname(model) if model.endswith(".gguf") else model, kept} - {""}:
        evict(folder)
    command = [sys.executable, "-m", "benchmarks.codecs", "--worker", "yes", "--form", form, "--budget", budget]
    limit = (parse_bytes(budget) or 0) + (BESIDE_MIB << 20)
    with MemoryGroup(limit, parse_bytes(request.disk_rate), os.path.dirname(model) or ".") as group:
        return group.measure([*command, "--model", model, "--kept", kept])


def worker(request: argparse.Namespace) -> dict[str, Any]:
    from offload import offload
    from offload.config import parse_bytes

    encoded = {"weights": request.form, "disk_dir": request.kept} if request.kept else {}
    options = {
        "device": "cpu",
        "cpu_memory": parse_bytes(request.budget),
        "max_tokens": PROMPT + NEW_TOKENS,
        "new_tokens": NEW_TOKENS,
    }
    with offload(request.model, **options, **encoded) as session:
        token_moments(session.model, PROMPT, 2)
        moments = token_moments(session.model, PROMPT, NEW_TOKENS)
        report = session.report()
    gaps = [after - before for before, after in zip(moments, moments[1:], strict=False)]
    return {
        "token_seconds": round(statistics.median(gaps), 4),
        "streamed_bytes": report.streamed_bytes_per_pass,
        "kept_encoded": report.blocks["streamed_from_cpu_memory"],
        "waits": {name: round(seconds, 2) for name, seconds in report.decode.wait_seconds.items()},
        "measured_at": time.strftime("%H:%M:%S"),
    }


def summary_of(rounds: list[dict[str, Any]], form: str, budget: str) -> dict[str, Any]:
    """Medians, and over bf16 in the same budget: tokens a second, and streamed bytes."""
    pairs = [(found[f"{form} in {budget}"], found[f"bf16 in {budget}"]) for found in rounds]
    whole = [(mine, plain) for mine, plain in pairs if "token_seconds" in mine and "token_seconds" in plain]
    if not whole:
        return {"failed": pairs[0][0].get("failed", pairs[0][1].get("failed"))}
    return {
        "token_seconds": statistics.median(mine["token_seconds"] for mine, _ in whole),
        "times_as_fast": round(statistics.median(plain["token_seconds"] / mine["token_seconds"] for mine, plain in whole), 2),
        "times_fewer_bytes": round(whole[0][1]["streamed_bytes"] / max(1, whole[0][0]["streamed_bytes"]), 2),
        "kept_encoded": whole[0][0]["kept_encoded"],
    }


if __name__ == "__main__":
    main()
