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
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory_group import evict
from offload import Training, offload
from offload.config import parse_bytes, resolve_device
from offload.probe import measure as probe
from offload.scheduler.hardware import HardwareProfile
from offload.synth import synthesize

CPU_MEMORY = "64GiB"
PROMPT_TOKENS = 64
LORA_STEPS = 4
RAW_BYTES = 512 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4GB")
    parser.add_argument("--gpu-memory", default="1GiB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=2048, help="of the long prompt, and of a step of LoRA")
    parser.add_argument("--hardware", metavar="FILE", help="a profile to plan by; by default the machine is measured")
    parser.add_argument("--folder", help="where to make the checkpoint; by default a temporary folder")
    parser.add_argument("--out")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    request = parser.parse_args()
    size = parse_bytes(request.size)
    assert size is not None
    found: dict[str, Any] = {
        "card": torch.cuda.get_device_name(),
        "machine": {"system": platform.platform(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "request": {name: value for name, value in vars(request).items() if name not in ("out", "folder")},
        "rounds": {name: [] for name in request.cases},
    }
    with tempfile.TemporaryDirectory(dir=request.folder) as scratch:
        model = f"{scratch}/model"
        synthesize(model, size)
        if request.hardware:
            hardware = HardwareProfile.load(request.hardware)
        else:
            hardware = probe(resolve_device("cuda"), scratch, lambda what, done, total: None)
        found["hardware"] = hardware.to_dict()
        for _ in range(request.rounds):
            for name in request.cases:
                raw = raw_bytes_per_second()
                figures = CASES[name](model, request, hardware)
                found["rounds"][name].append(figures | {"raw_h2d_bytes_per_second": raw})
                print(name, {key: value for key, value in figures.items() if key != "report"}, flush=True)
                found["median"] = medians(found["rounds"])
                if request.out:
                    Path(request.out).write_text(json.dumps(found, indent=1) + "\n")
                gc.collect()
                torch.cuda.empty_cache()
    print(json.dumps(found.get("median"), indent=2))


def medians(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    return {
        name: {key: statistics.median(item[key] for item in items) for key in items[0] if isinstance(items[0][key], float)}
        for name, items in rounds.items()
        if items
    }


def raw_bytes_per_second() -> float:
    """The best that the link gives to large copies from page-locked memory, one after another."""
    source = torch.empty(RAW_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    best = 0.0
    for _ in range(4):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(4):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, 4 * RAW_BYTES / (time.perf_counter() - begun))
    return best


def prompt(tokens: int) -> torch.Tensor:
    return torch.randint(3, 1000, (1, tokens), generator=torch.Generator().manual_seed(0)).cuda()


def token_seconds(model: Any, tokens: int) -> float:
    """Median of decode steps, until each token is known, as in `generate`; of the second time over the same lengths."""
    times: list[float] = []
    for _ in range(2):
        times = []
        with torch.inference_mode():
            output = model(prompt(PROMPT_TOKENS), use_cache=True)
            for _ in range(tokens):
                begun = time.perf_counter()
                token = output.logits[:, -1:].argmax(-1)
                output = model(token, past_key_values=output.past_key_values, use_cache=True)
                int(output.logits[0, -1].argmax())
                times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def decode(budgets: dict[str, str]) -> Callable[..., dict[str, Any]]:
    """Decode speed, and the share of the slowest link's bandwidth that it reaches by wall time."""

    def measured(model: str, request: argparse.Namespace, hardware: HardwareProfile) -> dict[str, Any]:
        evict(model)
        raw = raw_bytes_per_second()
        options = {"gpu_memory": request.gpu_memory, "max_tokens": 128, "device": "cuda", "hardware": hardware, **budgets}
        tokens = request.tokens if "cpu_memory" not in budgets else 4
        with offload(model, **{"cpu_memory": CPU_MEMORY, **options}) as session:
            seconds = token_seconds(session.model, tokens)
            report = session.report()
        on_disk = bool(report.blocks["streamed_from_disk"])
        rate = report.links["disk"].measured_bytes_per_second if on_disk else raw
        prediction = report.prediction
        assert prediction is not None
        return {
            "seconds_per_token": seconds,
            "link": "disk" if on_disk else "h2d",
            "link_share": report.streamed_bytes_per_pass / seconds / (rate or float("nan")),
            "predicted_seconds_per_token_error": prediction.seconds_per_token_error,
            "peak_error": report.peak.predicted_bytes / (report.peak.measured_bytes or 1) - 1,
            "report": report.to_dict(),
        }

    return measured


def accelerate(model: str, request: argparse.Namespace, hardware: HardwareProfile) -> dict[str, Any]:
    """Its CPU offload, with as much of the model on the card as fits the same memory."""
    from transformers import AutoModelForCausalLM

    memory = {0: request.gpu_memory, "cpu": CPU_MEMORY}
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", device_map="auto", max_memory=memory).eval()
    return {"seconds_per_token": token_seconds(loaded, 4)}


def windows(model: str, request: argparse.Namespace, hardware: HardwareProfile) -> dict[str, Any]:
    """What an onload scope costs a layer where everything stays on the card: beside the plain model, in turn."""
    with offload(model, device="cuda", gpu_memory="16GiB", cpu_memory=CPU_MEMORY, max_tokens=128, hardware=hardware) as session:
        assert not session.plan.weights.streamed
        resident, layers = on_card(model), session.model.config.num_hidden_layers
        pairs = [(token_seconds(session.model, request.tokens), token_seconds(resident, request.tokens)) for _ in range(3)]
    ours, plain = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    return {"seconds_per_token": ours, "plain_seconds_per_token": plain, "overhead_seconds_a_layer": (ours - plain) / layers}


def prefill(model: str, request: argparse.Namespace, hardware: HardwareProfile) -> dict[str, Any]:
    """A long prompt: the transfers hide behind compute, or the other way round; beside the model held on the card."""
    options = {"gpu_memory": "2GiB", "cpu_memory": CPU_MEMORY, "max_tokens": request.prompt_tokens, "hardware": hardware}
    with torch.inference_mode(), offload(model, device="cuda", **options) as session:
        taken = prompt_seconds(session.model, request.prompt_tokens - 8)
        streamed = session.plan.weights.streamed_bytes / raw_bytes_per_second()
    with torch.inference_mode():
        resident = prompt_seconds(on_card(model), request.prompt_tokens - 8)
    return {"seconds": taken, "resident_seconds": resident} | shares(taken, streamed, resident)


def prompt_seconds(model: Any, tokens: int) -> float:
    """Median, until the first token is known."""
    ids, seconds = prompt(tokens), []
    for _ in range(6):
        begun = time.perf_counter()
        int(model(ids, logits_to_keep=1).logits[0, -1].argmax())
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def on_card(model: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval().cuda()


def shares(taken: float, link: float, compute: float) -> dict[str, float]:
    """How near it comes to the link's time, and to the larger of it and of what the card computes without any transfers."""
    return {"link_share": link / taken, "bound_share": max(link, compute) / taken}


def lora(model: str, request: argparse.Namespace, hardware: HardwareProfile) -> dict[str, Any]:
    """A step of LoRA: the weights cross the link twice; beside one with all weights on the card and checkpointed layers."""
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    ids = prompt(request.prompt_tokens)
    options = {"gpu_memory": "3GiB", "cpu_memory": CPU_MEMORY, "max_tokens": request.prompt_tokens, "hardware": hardware}
    with offload(model, device="cuda", training=Training(), **options) as session:
        adapted = get_peft_model(session.model, adapters).train()

        def step() -> None:
            session.backward([lambda: adapted(input_ids=ids, labels=ids, use_cache=False).loss])
            session.step(1.0, overlap=True)

        taken = step_seconds(step)
        streamed = 2 * session.plan.weights.streamed_bytes / raw_bytes_per_second()
        report = session.report().to_dict()
    plain = get_peft_model(on_card(model), adapters).train()
    plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([value for value in plain.parameters() if value.requires_grad], fused=True)

    def plain_step() -> None:
        loss = plain(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    resident = step_seconds(plain_step)
    return (
        {"seconds_a_step": taken, "resident_seconds_a_step": resident} | shares(taken, streamed, resident) | {"report": report}
    )


def step_seconds(step: Callable[[], None]) -> float:
    """Of several steps, one after another."""
    step()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(LORA_STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / LORA_STEPS


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "from CPU memory": decode({}),
    "from disk": decode({"cpu_memory": "1500MiB"}),
    "accelerate": accelerate,
    "nothing streamed": windows,
    "prefill": prefill,
    "LoRA": lora,
    "CPU and card": decode({"exactness": "rounding"}),
}


if __name__ == "__main__":
    main()
