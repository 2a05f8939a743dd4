"""`offload synth`: a random-weight checkpoint, to try and measure at scale without a download."""

import argparse

from offload.cli.terminal import progress_bar, say
from offload.config import parse_bytes
from offload.storage.errors import gib
from offload.synth import FAMILIES, synthesize

SUMMARY = "Write a checkpoint with random weights, sharded like real ones, with a tokenizer."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", metavar="DIR", help="where; made if need be, and must be empty")
    add("--size", required=True, metavar="SIZE", help="of the weights, like 4GiB; met within a few percent")
    add("--family", default="llama", choices=tuple(FAMILIES), help="the architecture (default: llama)")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="(default: bfloat16)")
    add("--shard-size", default="2GiB", metavar="SIZE", help="of one file (default: 2GiB)")
    add("--seed", type=int, default=0, metavar="N", help="the same one gives the same bytes (default: 0)")


def run(request: argparse.Namespace) -> None:
    size, shard = parse_bytes(request.size, "--size"), parse_bytes(request.shard_size, "--shard-size")
    assert size is not None
    assert shard is not None
    with progress_bar() as show:
        written = synthesize(
            request.folder,
            size,
            family=request.family,
            dtype=request.dtype,
            shard_bytes=shard,
            seed=request.seed,
            progress=lambda done, total: show("writing", done, total),
        )
    say(f"{request.folder}: {gib(written)} of {request.family} weights in {request.dtype}")
