"""Claim: on a CUDA card, decode runs at the speed of the link that the weights cross.

Weights in page-locked CPU memory against the measured host-to-device bandwidth; weights on disk against the measured disk; what
was predicted from a probe made at the start against what was measured. One JSON object with medians over the rounds.

    python -m benchmarks.gpu --size 8GB --rounds 5 --out benchmarks/results/gpu.json
"""

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory_group import evict
from benchmarks.stream import token_seconds
from offload import offload
from offload.config import parse_bytes, resolve_device
from offload.probe import measure as probe
from offload.synth import synthesize
from scheduler.hardware import HardwareProfile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="8GB")
    parser.add_argument("--gpu-memory", default="2GiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--folder", help="where to make the checkpoint; by default a temporary folder")
    parser.add_argument("--out")
    request = parser.parse_args()
    size = parse_bytes(request.size)
    assert size is not None
    with tempfile.TemporaryDirectory(dir=request.folder) as scratch:
        model = f"{scratch}/model"
        synthesize(model, size)
        hardware = probe(resolve_device("cuda"), scratch, lambda what, done, total: None)
        rounds = [
            {name: measure(model, request, hardware, case) for name, case in CASES.items()} for _ in range(request.rounds)
        ]
    summary: dict[str, Any] = {
        "card": torch.cuda.get_device_name(),
        "machine": {"system": platform.platform(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "request": vars(request),
        "hardware": hardware.to_dict(),
    }
    for case in CASES:
        for figure in ("seconds_per_token", "link_share", "prefill_error", "token_error", "model_error", "peak_error"):
            summary[f"{case}.{figure}"] = statistics.median(item[case][figure] for item in rounds)
    print(json.dumps(summary, indent=2))
    if request.out:
        Path(request.out).write_text(json.dumps({"summary": summary, "rounds": rounds}, indent=2) + "\n")


CASES = {
    "from CPU memory": {"cpu_memory": "64GiB"},
    "from disk": {"cpu_memory": "1500MiB"},
    "CPU and card": {"cpu_memory": "64GiB", "exactness": "rounding"},
}


def measure(model: str, request: argparse.Namespace, hardware: HardwareProfile, case: dict[str, str]) -> dict[str, Any]:
    """Decode speed, and the share of the slowest link's bandwidth that it reaches by wall time."""
    evict(model)
    budgets = {"gpu_memory": request.gpu_memory, **case}
    with offload(model, device="cuda", hardware=hardware, max_tokens=64, **budgets) as session:
        seconds = statistics.median(token_seconds(session.model, request.tokens))
        report = session.report()
    link = report.links["disk" if report.blocks["streamed_from_disk"] else "h2d"]
    prediction = report.prediction
    assert prediction is not None
    reached = report.streamed_bytes_per_pass / seconds
    return {
        "seconds_per_token": seconds,
        "link_share": reached / (link.measured_bytes_per_second or float("nan")),
        "prefill_error": prediction.prefill_error,
        "token_error": prediction.seconds_per_token_error,
        "model_error": prediction.model_error,
        "peak_error": report.peak.predicted_bytes / (report.peak.measured_bytes or 1) - 1,
        "report": report.to_dict(),
    }


if __name__ == "__main__":
    main()
