"""A batch whose prompts begin alike: the beginning computed and read once, against the same batch without sharing.

    python -m benchmarks.kv_sharing [--batch 32] [--prefix 2000] [--rounds 3] [--output FILE.json]

Both run in the same process, by turns, through the same `complete` that `offload generate` uses; only `shared_prefix` differs.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.finetune import machine
from offload import offload

SUFFIX_TOKENS, NEW_TOKENS = 16, 32


def make() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        initializer_range=0.08,
    )
    return LlamaForCausalLM(config).eval()


def once(model: Any, ids: torch.Tensor, prefix: int, shared: bool) -> tuple[torch.Tensor, float, float]:
    """New tokens, seconds to the first of them, and of all."""
    options = {"exactness": "rounding", "shared_prefix": prefix} if shared else {}
    total = ids.shape[1] + NEW_TOKENS
    with (
        offload(model, device="cpu", cpu_memory="12GiB", batch_size=len(ids), max_tokens=total, **options) as session,
        torch.inference_mode(),
    ):
        begun = time.perf_counter()
        cache = session.kv_cache(ids[0, :prefix].tolist(), len(ids)) if shared else None
        first = [0.0]

        class Watch:
            def put(self, value: torch.Tensor) -> None:
                first[0] = first[0] if value.numel() == ids.numel() or first[0] else time.perf_counter() - begun

            def end(self) -> None:
                pass

        output = session.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            past_key_values=cache,
            streamer=Watch(),
            pad_token_id=0,
        )
        seconds = time.perf_counter() - begun
        report = session.report()
        assert report.exactness == ("rounding" if shared else "identical")
        if shared:
            print("  ", {name: value for name, value in report.kv.items() if value})
    return output[:, ids.shape[1] :], first[0], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prefix", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", metavar="FILE.json")
    request = parser.parse_args()
    model = make()
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randint(3, 2000, (1, request.prefix), generator=generator).expand(request.batch, -1)
    ids = torch.cat([prefix, torch.randint(3, 2000, (request.batch, SUFFIX_TOKENS), generator=generator)], dim=1)
    rows = []
    for _ in range(request.rounds):
        plain, plain_first, plain_seconds = once(model, ids, request.prefix, shared=False)
        ours, first, seconds = once(model, ids, request.prefix, shared=True)
        steps = NEW_TOKENS - 1
        row = {
            "plain_seconds": plain_seconds,
            "shared_seconds": seconds,
            "times_the_tokens_a_second": plain_seconds / seconds,
            "times_in_decode": (plain_seconds - plain_first) / (seconds - first),
            "plain_step_ms": 1e3 * (plain_seconds - plain_first) / steps,
            "shared_step_ms": 1e3 * (seconds - first) / steps,
            "equal_tokens": float((plain == ours).float().mean()),
        }
        rows.append(row)
        print({name: round(value, 3) for name, value in row.items()}, flush=True)
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    print("median", {name: round(value, 3) for name, value in medians.items()})
    if request.output:
        Path(request.output).write_text(json.dumps({"machine": machine(), "rounds": rows, "median": medians}, indent=1))


if __name__ == "__main__":
    main()
