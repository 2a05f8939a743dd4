"""Claim: on a CUDA card, decode runs at the speed of the link that the weights cross.

Weights in page-locked CPU memory against the host-to-device rate that was measured in the same run; weights on disk against the
disk's; accelerate's CPU offload in the same device memory; a long prompt; a LoRA step; what onload scopes cost where nothing
is streamed; what was predicted from a probe made at the start against what was measured. One JSON object, written after each
case.

    python -m benchmarks.gpu --size 4GB --rounds 3 --out benchmarks/results/gpu.json

Each decode is run twice, and the second time counts: on Hopper cards torch's attention makes a plan for each new length of the
context (some 40 ms), for whoever asks first.
"""

import argparse
import datetime
import gc
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkout import commit
from benchmarks.gpu_cases import CASES, raw_bytes_per_second
from offload.config import parse_bytes
from offload.probe import measure as probe
from offload.scheduler.hardware import HardwareProfile
from offload.storage.devices.resolve import resolve_device
from offload.synth import synthesize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", default="12GB")
    add("--model", help="a checkpoint of that size that is there already; by default one is made")
    add("--gpu-memory", default="3GiB", help="of decode; a long prompt gets twice, and LoRA three times as much")
    add("--cpu-memory", default="64GiB")
    add("--rounds", type=int, default=3)
    add("--tokens", type=int, default=16)
    add("--prompt-tokens", type=int, default=2048, help="of the long prompt, and of a step of training")
    add("--hardware", metavar="FILE", help="a profile to plan by; by default the machine is measured")
    add("--folder", help="where to make checkpoints; by default a temporary folder")
    add("--out")
    add("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    request = parser.parse_args()
    found: dict[str, Any] = {
        "card": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": {"system": platform.platform(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "request": {name: value for name, value in vars(request).items() if name not in ("out", "folder", "model")},
        "rounds": {name: [] for name in request.cases},
        "failed": {},
    }
    with tempfile.TemporaryDirectory(dir=request.folder) as scratch:
        model = request.model or made(f"{scratch}/model", request.size)
        if request.hardware:
            hardware = HardwareProfile.load(request.hardware)
        else:
            hardware = probe(resolve_device("cuda"), scratch, lambda what, done, total: None)
        found["hardware"] = hardware.to_dict()
        for _ in range(request.rounds):
            for name in request.cases:
                measure(name, model, request, hardware, found)
                if request.out:
                    Path(request.out).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["median"], indent=2))
    if found["failed"]:
        raise SystemExit(f"failed: {found['failed']}")


def measure(name: str, model: str, request: argparse.Namespace, hardware: HardwareProfile, found: dict[str, Any]) -> None:
    """One case; what fails is noted, and the others go on."""
    try:
        figures = CASES[name](model, request, hardware) | {"raw_h2d_bytes_per_second": raw_bytes_per_second()}
    except Exception as error:
        found["failed"][name] = f"{type(error).__name__}: {error}"
        print(name, found["failed"][name], flush=True)
    else:
        found["rounds"][name].append(figures)
        print(name, {key: value for key, value in figures.items() if key != "report"}, flush=True)
    found["median"] = medians(found["rounds"])
    gc.collect()
    torch.cuda.empty_cache()


def made(folder: str, size: str) -> str:
    nbytes = parse_bytes(size)
    assert nbytes is not None
    synthesize(folder, nbytes)
    return folder


def medians(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    return {
        name: {key: statistics.median(item[key] for item in items) for key in items[0] if isinstance(items[0][key], float)}
        for name, items in rounds.items()
        if items
    }


if __name__ == "__main__":
    main()
