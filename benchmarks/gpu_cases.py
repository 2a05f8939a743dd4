"""What is measured on a card: each case takes a checkpoint and gives figures; `benchmarks.gpu` runs them."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory_group import evict
from offload import Training, offload
from offload.config import parse_bytes
from offload.scheduler.hardware import HardwareProfile
from offload.storage.io_engines.posix import PosixEngine
from offload.storage.read_speed import read_speed, spans
from offload.synth import synthesize

Figures = dict[str, Any]
PROMPT_TOKENS = 64
STEPS = 4
RAW_BYTES = 512 << 20
DISK_BYTES = 2 << 30


def raw_disk_bytes_per_second(model: str) -> float | None:
    """What O_DIRECT gives of the checkpoint's largest file, asked in the way that the disk likes best."""
    engine = PosixEngine()
    try:
        largest = max(Path(model).glob("*.safetensors"), key=lambda path: path.stat().st_size)
        return read_speed(engine, spans(str(largest), DISK_BYTES, engine.unit_bytes)).bytes_per_second
    finally:
        engine.close()


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


def decode(**options: str) -> Callable[..., Figures]:
    """Decode speed, and the share of the slowest link's bandwidth that it reaches by wall time."""

    def measured(model: str, request: argparse.Namespace, hardware: HardwareProfile) -> Figures:
        return decoded(model, request, hardware, {"gpu_memory": request.gpu_memory} | options)

    return measured


def decoded(model: str, request: argparse.Namespace, hardware: HardwareProfile, options: Figures) -> Figures:
    evict(model)
    raw, disk = raw_bytes_per_second(), raw_disk_bytes_per_second(model)
    given = {"cpu_memory": request.cpu_memory, "max_tokens": 128, "device": "cuda", "hardware": hardware}
    with offload(model, **(given | options)) as session:
        tokens = 4 if options.get("cpu_memory") else request.tokens
        seconds = token_seconds(session.model, tokens)
        report = session.report()
    on_disk = bool(report.blocks["streamed_from_disk"])
    prediction = report.prediction
    assert prediction is not None
    return {
        "seconds_per_token": seconds,
        "link": "disk" if on_disk else "h2d",
        "link_share": report.streamed_bytes_per_pass / seconds / ((disk if on_disk else raw) or float("nan")),
        "raw_disk_bytes_per_second": disk or float("nan"),
        "streamed_bytes_per_token": report.streamed_bytes_per_pass,
        "predicted_seconds_per_token_error": prediction.seconds_per_token_error,
        "peak_bytes": report.peak.measured_bytes,
        "peak_error": report.peak.predicted_bytes / (report.peak.measured_bytes or 1) - 1,
        "report": report.to_dict(),
    }


def small_card(nbytes: int) -> Callable[..., Figures]:
    """As on a card of so many bytes, with budgets that nobody gave."""

    def measured(model: str, request: argparse.Namespace, hardware: HardwareProfile) -> Figures:
        with only(nbytes):
            return decoded(model, request, hardware, {}) | {"card_bytes": nbytes}

    return measured


@contextmanager
def only(nbytes: int) -> Iterator[None]:
    """Nothing of this process gets more of the card."""
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / torch.cuda.mem_get_info()[1]))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def accelerate(model: str, request: argparse.Namespace, hardware: HardwareProfile) -> Figures:
    """Its CPU offload, with as much of the model on the card as fits the same memory."""
    from transformers import AutoModelForCausalLM

    memory = {0: request.gpu_memory, "cpu": request.cpu_memory}
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", device_map="auto", max_memory=memory).eval()
    return {"seconds_per_token": token_seconds(loaded, 4)}


def windows(model: str, request: argparse.Namespace, hardware: HardwareProfile) -> Figures:
    """What an onload scope costs a layer where everything stays on the card: beside the plain model, in turn."""
    with offload(model, device="cuda", cpu_memory=request.cpu_memory, max_tokens=128, hardware=hardware) as session:
        assert not session.plan.weights.streamed
        resident, layers = on_card(model), session.model.config.num_hidden_layers
        pairs = [(token_seconds(session.model, request.tokens), token_seconds(resident, request.tokens)) for _ in range(3)]
    ours, plain = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    return {"seconds_per_token": ours, "plain_seconds_per_token": plain, "overhead_seconds_a_layer": (ours - plain) / layers}


def prefill(model: str, request: argparse.Namespace, hardware: HardwareProfile) -> Figures:
    """A long prompt: the transfers hide behind compute, or the other way round; beside the model held on the card."""
    options = {
        "gpu_memory": 2 * parse_bytes(request.gpu_memory),
        "cpu_memory": request.cpu_memory,
        "max_tokens": request.prompt_tokens,
        "hardware": hardware,
    }
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


def lora(model: str, request: argparse.Namespace, hardware: HardwareProfile) -> Figures:
    """A step of LoRA: the weights cross the link twice; beside one with all weights on the card and checkpointed layers."""
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    ids = prompt(request.prompt_tokens)
    options = {
        "gpu_memory": 3 * parse_bytes(request.gpu_memory),
        "cpu_memory": request.cpu_memory,
        "max_tokens": request.prompt_tokens,
        "hardware": hardware,
    }
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
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / STEPS


def full(model: str, request: argparse.Namespace, hardware: HardwareProfile) -> Figures:
    """A step of full fine-tuning of a quarter of the model, its states in CPU memory."""
    with smaller(request, 4) as folder:
        options = {"gpu_memory": request.gpu_memory, "cpu_memory": request.cpu_memory, "max_tokens": request.prompt_tokens}
        training = Training(full=True, learning_rate=1e-5)
        ids = prompt(request.prompt_tokens)
        with offload(folder, device="cuda", training=training, hardware=hardware, **options) as session:
            session.model.train()

            def step() -> None:
                session.backward([lambda: session.model(input_ids=ids, labels=ids, use_cache=False).loss])
                session.step(1.0, overlap=True)

            taken = step_seconds(step)
            session.finish()
            # Weights come twice, and gradients leave once.
            streamed = 2 * session.plan.weights.streamed_bytes / raw_bytes_per_second()
            return {"seconds_a_step": taken, "link_share": streamed / taken, "report": session.report().to_dict()}


def mixture(model: str, request: argparse.Namespace, hardware: HardwareProfile) -> Figures:
    """Decode of a mixture of a third of the size, a quarter of it on the card: single experts, and whole layers."""
    with smaller(request, 3, "qwen3_moe") as folder:
        gpu_memory = parse_bytes(request.size) // 12
        given = {"device": "cuda", "gpu_memory": gpu_memory, "cpu_memory": request.cpu_memory, "max_tokens": 128}
        seconds, hits = {}, 0.0
        for policy in ("auto", "layers"):
            with offload(folder, hardware=hardware, expert_policy=policy, **given) as session:
                seconds[policy] = token_seconds(session.model, request.tokens)
                use = session.report().experts
            if use is not None and use.choices:
                hits = use.hits / use.choices
    return {"seconds_per_token": seconds["auto"], "layers_seconds_per_token": seconds["layers"], "hits": hits}


@contextmanager
def smaller(request: argparse.Namespace, times: int, family: str = "llama") -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir=request.folder) as scratch:
        synthesize(f"{scratch}/model", parse_bytes(request.size) // times, family=family)
        yield f"{scratch}/model"


CASES: dict[str, Callable[..., Figures]] = {
    "from CPU memory": decode(),
    "accelerate": accelerate,
    "nothing streamed": windows,
    "prefill": prefill,
    "LoRA": lora,
    "a card of 8 GB": small_card(8_000_000_000),
    "a card of 24 GB": small_card(24_000_000_000),
    "mixture": mixture,
    "full": full,
    "from disk": decode(cpu_memory="1500MiB"),
    "CPU and card": decode(exactness="rounding"),
}
