"""What lossy KV caches forget: answers, answers asked for the first time late, and distance from the full cache.

    python -m benchmarks.kv_quality [--model DIR] [--texts 64] [--length 256] [--output FILE.json]

A small model is trained first (a minute or two), or taken from DIR. Every method runs as a user runs it, token by token;
baselines stand beside them that know nothing, random pages and a plain window, and one that shows what an outlier does to keys
quantised token by token. It is a toy: what it shows is an order, not numbers for large models.
"""

import argparse
import copy
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.recall_model import FILLER, Texts, texts, trained
from offload import offload
from offload.kv.kv_block import KvBlock
from offload.kv.options import METHODS, Method
from offload.kv.page_layout import KeyValue, PageLayout
from offload.kv.policies.base import FullAttention, Selection
from offload.kv.policies.budget import KvBudget
from offload.kv.quantization import PageQuantizer

BUDGETS = (0.5, 0.25)
OUTLIERS = (1, 30, 100)


class RandomPages(FullAttention):
    """The last tokens, and of the rest any pages, the same ones as long as they are seen."""

    own_attention = True

    def __init__(self, budget: KvBudget) -> None:
        self._budget = budget
        self._generator = torch.Generator().manual_seed(3)
        self._rank: dict[int, float] = {}

    def chosen(self, blocks: Sequence[KvBlock], length: int, query: torch.Tensor) -> list[Selection]:
        for block in blocks:
            self._rank.setdefault(block.start, float(torch.rand((), generator=self._generator)))
        room = self._budget.of(length) - blocks[-1].tokens
        seen = {blocks[-1].start}
        for block in sorted(blocks[:-1], key=lambda item: self._rank[item.start]):
            if block.tokens <= room:
                room -= block.tokens
                seen.add(block.start)
        return [Selection(block) for block in blocks if block.start in seen]


class KeysByToken(PageQuantizer):
    """What not to do: a token's keys share a scale, so that a channel far larger than the others takes their levels away."""

    def nbytes(self, shape: PageLayout) -> int:
        lines = shape.rows * shape.heads * shape.tokens
        return lines * (self.codec.nbytes(shape.key_dim) + self.codec.nbytes(shape.value_dim))

    def encode(self, pair: KeyValue, shape: PageLayout, memory: torch.Tensor) -> bool:
        place = 0
        for part in pair:
            lines = part.reshape(-1, part.shape[-1])
            encoded = self.codec.parts(*lines.shape, lines.device)
            self.codec.encode(lines, encoded)
            memory[place : place + encoded[0].numel()].copy_(encoded[0].view(-1))
            place += encoded[0].numel()
        return True

    def decode(self, memory: torch.Tensor, shape: PageLayout) -> KeyValue:
        lines, place, parts = shape.rows * shape.heads * shape.tokens, 0, []
        for dim in (shape.key_dim, shape.value_dim):
            end = place + lines * self.codec.nbytes(dim)
            part = self.codec.decode([memory[place:end]], dim)
            parts.append(part.view(shape.rows, shape.heads, shape.tokens, dim).to(shape.dtype))
            place = end
        return KeyValue(*parts)


@dataclass(frozen=True, slots=True)
class Score:
    """Of one method.

    Attributes:
        recall: right answers.
        first_asked_late: right answers to questions asked late, for the first time, about old facts.
        divergence: nats a token, from the full cache's predictions to the method's.
        loss: of the noise, nats a token: what perplexity sees.
        interval: half the width of the 95% interval of `recall`.
    """

    recall: float
    first_asked_late: float
    divergence: float
    loss: float
    interval: float
    seconds: float


def logits_of(model: Any, batch: Texts, **options: Any) -> torch.Tensor:
    """Token by token, [texts, length, vocabulary]."""
    count, length = batch.tokens.shape
    with (
        offload(model, device="cpu", cpu_memory="2GiB", batch_size=count, max_tokens=length, **options) as session,
        torch.inference_mode(),
    ):
        cache = session.kv_cache()
        steps = [
            session.model(input_ids=batch.tokens[:, place : place + 1], past_key_values=cache).logits for place in range(length)
        ]
    return torch.cat(steps, dim=1)


def score(logits: torch.Tensor, full: torch.Tensor, batch: Texts, seconds: float) -> Score:
    targets = batch.tokens[:, 1:]
    right = logits[:, :-1].argmax(-1) == targets
    asked, late = batch.asked_at[:, :-1], batch.first_asked_late[:, :-1]
    ours, theirs = logits.log_softmax(-1), full.log_softmax(-1)
    recall = right[asked].float().mean().item()
    noise = targets < FILLER
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    return Score(
        recall,
        right[late].float().mean().item(),
        (theirs.exp() * (theirs - ours)).sum(-1).mean().item(),
        losses[noise].mean().item(),
        1.96 * math.sqrt(max(recall * (1 - recall), 1e-9) / int(asked.sum())),
        seconds,
    )


def with_outlier(model: Any, scale: float) -> Any:
    """The same function: one pair of key channels is `scale` times as large in every head, the queries' as much smaller."""
    twin = copy.deepcopy(model)
    config = twin.config
    dim, groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        for layer in twin.model.layers:
            # A pair that turns together, or it would not be the same function.
            for channel in (3, 3 + dim // 2):
                for head in range(config.num_key_value_heads):
                    layer.self_attn.k_proj.weight[head * dim + channel] *= scale
                for head in range(config.num_key_value_heads * groups):
                    layer.self_attn.q_proj.weight[head * dim + channel] /= scale
    return twin


def run(model: Any, batch: Texts) -> dict[str, Score]:
    METHODS["random"] = Method(policy=RandomPages, page_tokens=METHODS["retrieve"].page_tokens)
    METHODS["int4 keys by token"] = Method(codec=KeysByToken(4))
    full = logits_of(model, batch)
    found = {"full": score(full, full, batch, 0.0)}

    def measure(name: str, model: Any, **options: Any) -> None:
        begun = time.perf_counter()
        logits = logits_of(model, batch, **options)
        found[name] = score(logits, full, batch, time.perf_counter() - begun)
        print(f"{name:28}", _line(found[name]), flush=True)

    print(f"{'full':28}", _line(found["full"]), flush=True)
    for budget in BUDGETS:
        for name in ("random", "window", "retrieve"):
            measure(f"{name} {budget:.0%}", model, kv_policy=name, kv_budget=budget)
    for scale in OUTLIERS:
        twin = model if scale == 1 else with_outlier(model, scale)
        for name in ("int8", "int4", "int4 keys by token"):
            measure(f"{name}, outlier x{scale}", twin, kv_policy=name)
    return found


def _line(item: Score) -> str:
    return (
        f"recall {item.recall:.3f} +- {item.interval:.3f}, first asked late {item.first_asked_late:.3f}, "
        f"KL {item.divergence:.4f}, noise {item.loss:.3f}, {item.seconds:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="keep the trained model there, or take it from there")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--output", metavar="FILE.json")
    request = parser.parse_args()
    model, noise = trained(request.model, lambda line: print(line, flush=True))
    batch = texts(request.texts, request.length, 1, noise)
    found = run(model, batch)
    if request.output:
        machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
        scores = {name: {field: getattr(item, field) for field in Score.__slots__} for name, item in found.items()}
        Path(request.output).write_text(json.dumps({"machine": machine, "scores": scores}, indent=1))


if __name__ == "__main__":
    main()
