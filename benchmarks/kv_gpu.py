"""On a CUDA card: decode after a long context whose keys and values do not stay, against transformers' own offloaded cache.

    python -m benchmarks.kv_gpu [--tokens 32768] [--rounds 3] [--output FILE.json]

The same model, resident as a whole, with the same random keys and values: ours with an eighth of them on the card (layers put
together; piece by piece), `DynamicCache(offloading=True)`, and all of them on the card. Tokens must be equal where the level is
identical.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.finetune import machine
from benchmarks.kv_offload import DIM, FILL_TOKENS, KV_HEADS, LAYERS, TOKEN_BYTES, _model
from offload import offload

STEPS = 8


def _parts(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = [min(FILL_TOKENS, tokens - start) for start in range(0, tokens, FILL_TOKENS)]
    return [torch.randn(1, KV_HEADS, size, DIM, generator=generator).bfloat16().cuda() for size in sizes]


def _decoded(model: Any, cache: Any) -> tuple[list[int], float]:
    """Tokens, and the median of a step's seconds."""
    chosen, seconds = [7], []
    torch.cuda.synchronize()
    for _ in range(STEPS):
        begun = time.perf_counter()
        output = model(input_ids=torch.tensor([chosen[-1:]], device="cuda"), past_key_values=cache)
        # Waits for the token, as `generate` does, and for nothing that goes on meanwhile.
        chosen.append(int(output.logits[0, -1].argmax()))
        seconds.append(time.perf_counter() - begun)
    return chosen, statistics.median(seconds[2:])


def ours(tokens: int, exactness: str) -> dict[str, Any]:
    memory = tokens * TOKEN_BYTES // 8
    options = {"device": "cuda", "max_tokens": tokens + STEPS + 1, "kv_memory": memory}
    with offload(_model(), exactness=exactness, **options) as session, torch.inference_mode():
        cache = session.kv_cache()
        for part in _parts(tokens):
            for layer in cache.layers:
                layer.paged.append(part, part)
                layer.is_initialized = True
        chosen, seconds = _decoded(session.model, cache)
        report = session.report()
        return {"tokens": chosen, "seconds": seconds, "exactness": report.exactness, "kv": report.kv}


def theirs(tokens: int, offloading: bool) -> dict[str, Any]:
    model = _model().cuda()
    with torch.inference_mode():
        cache = DynamicCache(config=model.config, offloading=offloading)
        for part in _parts(tokens):
            for index in range(LAYERS):
                cache.update(part, part, index)
        chosen, seconds = _decoded(model, cache)
    return {"tokens": chosen, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours-only", action="store_true", help="the pretended card refuses transformers' offloaded cache")
    parser.add_argument("--output", metavar="FILE.json")
    request = parser.parse_args()
    rows = []
    # Once uncounted: torch's attention makes a plan for each new length, for whoever asks first.
    theirs(request.tokens, False)
    for _ in range(request.rounds):
        row = {
            "identical": ours(request.tokens, "identical"),
            "rounding": ours(request.tokens, "rounding"),
            "resident": theirs(request.tokens, False),
        }
        if not request.ours_only:
            row["transformers_offloaded"] = theirs(request.tokens, True)
        assert row["identical"]["tokens"] == row["resident"]["tokens"]
        rows.append(row)
        print({name: round(value["seconds"] * 1e3, 2) for name, value in row.items()}, "ms a token", flush=True)
    medians = {name: statistics.median(row[name]["seconds"] for row in rows) for name in rows[0]}
    print("median", medians)
    if request.output:
        Path(request.output).write_text(json.dumps({"machine": machine(), "rounds": rows, "median": medians}, indent=1))


if __name__ == "__main__":
    main()
