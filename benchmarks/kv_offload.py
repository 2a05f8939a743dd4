"""A context whose keys and values are eight times the memory they may have: how close decode comes to the disk's own speed.

    python -m benchmarks.kv_offload [--tokens 65536] [--rounds 3] [--output FILE.json]

Each round runs in a fresh control group whose limit is what Python and torch take and the memory that was asked for, so that
nothing can be kept in the page cache. The cache is filled with random keys and values, layer by layer (reading a prompt so
long would take hours on two cores); then tokens are decoded, and the same bytes are read from the same disk with nothing else
to do. Needs root.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.finetune import machine
from benchmarks.memory_group import MemoryGroup

LAYERS, KV_HEADS, DIM = 16, 8, 64
TOKEN_BYTES = LAYERS * 2 * KV_HEADS * DIM * 2
STEPS = 6
FILL_TOKENS = 2048
BESIDE_BYTES = 700 << 20
"""Python, torch, the model, and what a layer's temporaries take."""


def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        max_position_embeddings=1 << 20,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).eval()
    for value in model.parameters():
        value.data = value.data.bfloat16()
    return model


def child(tokens: int, exactness: str) -> dict[str, Any]:
    """Decode after so many tokens; seconds, bytes, and what reading these bytes takes by itself."""
    from offload import offload
    from offload.scheduler.phases import DECODE
    from offload.storage.process_memory import process_bytes

    torch.set_num_threads(2)
    model = _model()
    before = process_bytes()
    memory = tokens * TOKEN_BYTES // 8
    peak = 0
    with (
        offload(
            model, device="cpu", cpu_memory="4GiB", max_tokens=tokens + STEPS + 1, kv_memory=memory, exactness=exactness
        ) as session,
        torch.inference_mode(),
    ):
        cache = session.kv_cache()
        generator = torch.Generator().manual_seed(1)
        for start in range(0, tokens, FILL_TOKENS):
            part = torch.randn(1, KV_HEADS, min(FILL_TOKENS, tokens - start), DIM, generator=generator).bfloat16()
            for layer in cache.layers:
                layer.paged.append(part, part)
                layer.is_initialized = True
        part = session._kv.paged
        token, seconds = torch.tensor([[7]]), []
        brought = 0
        for _ in range(STEPS):
            came, begun = part.onloaded_bytes, time.perf_counter()
            session.model(input_ids=token, past_key_values=cache)
            seconds.append(time.perf_counter() - begun)
            brought = part.onloaded_bytes - came
            peak = max(peak, process_bytes() - before)
        raw = _raw_seconds(part, brought)
        report, decode = session.report(), session.machine.clock.phases[DECODE]
    step = statistics.median(seconds[1:])
    return {
        "exactness": report.exactness,
        "context_bytes": tokens * TOKEN_BYTES,
        "memory_bytes": memory,
        "pages": part.pages.device_pages,
        "page_bytes": part.pages.page_bytes,
        "bytes_a_token": brought,
        "seconds_a_token": step,
        "compute_seconds": decode.compute_seconds / decode.passes,
        "raw_read_seconds": raw,
        "of_the_raw_speed": raw / step,
        "process_bytes_beside": peak,
    }


def _raw_seconds(part: Any, nbytes: int) -> float:
    """Read as many pages from the same file, four at a time, into the same memory."""
    from offload.storage.host_buffer import HostBuffer

    pool = part.store.raw
    buffers = [HostBuffer(pool.page_bytes) for _ in range(4)]
    count = nbytes // pool.page_bytes
    places = range(pool.file._pages)
    begun = time.perf_counter()
    transfers = []
    for index in range(count):
        place, memory = places[index % len(places)], buffers[index % 4].memory
        transfers.append(pool._reads.submit(pool.page_bytes, [lambda p=place, m=memory: pool.file.read(p, m)]))
    for transfer in transfers:
        transfer.wait()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", metavar="FILE.json")
    parser.add_argument("--child", metavar="EXACTNESS", help=argparse.SUPPRESS)
    request = parser.parse_args()
    if request.child:
        print(json.dumps(child(request.tokens, request.child)))
        return
    limit = BESIDE_BYTES + request.tokens * TOKEN_BYTES // 8
    rows: dict[str, list[dict[str, Any]]] = {"identical": [], "rounding": []}
    for _ in range(request.rounds):
        for exactness, found in rows.items():
            with MemoryGroup(limit) as group:
                command = [sys.executable, "-m", "benchmarks.kv_offload", "--child", exactness, "--tokens", str(request.tokens)]
                environment = os.environ | {"TMPDIR": tempfile.gettempdir(), "OFFLOAD_HARDWARE": "tests/described_machine.json"}
                done, _ = group.run(command, env=environment)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            row = json.loads(done.stdout.splitlines()[-1])
            found.append(row)
            print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}, flush=True)
    medians = {
        name: {
            key: statistics.median(row[key] for row in found)
            for key in ("seconds_a_token", "compute_seconds", "raw_read_seconds", "of_the_raw_speed")
        }
        for name, found in rows.items()
    }
    print("median", medians)
    if request.output:
        result = {"machine": machine(), "limit_bytes": limit, "rounds": rows, "median": medians}
        Path(request.output).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
