"""`offload synth`: a random-weight checkpoint, to try and measure at scale without a download."""

from offload.cli.arguments.others import SynthArguments
from offload.cli.terminal import progress_bar, say
from offload.config import parse_bytes
from offload.storage.errors import gib
from offload.synth import synthesize


def run(request: SynthArguments) -> None:
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
