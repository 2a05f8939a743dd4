"""`offload native build`: decoders of quantised weights, compiled for this machine."""

import json

from rich.table import Table

from offload.cli.arguments.others import BuildArguments
from offload.cli.terminal import print_table, say
from offload.storage.codecs.decode_speed import CODECS, decoded_bytes_per_second
from offload.storage.native.library import build, without_library

_DTYPE = "bfloat16"


def run(request: BuildArguments) -> None:
    with without_library():
        before = _speeds()
    path = build()
    after = _speeds()
    if request.json:
        print(json.dumps({"path": str(path), "dtype": _DTYPE, "torch": before, "native": after}))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"to {_DTYPE}, GB/s out")
    table.add_column("torch", justify="right")
    table.add_column("native", justify="right")
    for name in CODECS:
        table.add_row(name, f"{before[name] / 1e9:.2f}", f"{after[name] / 1e9:.2f}")
    print_table(table)
    say(f"kept in {path}")


def _speeds() -> dict[str, float]:
    """Bytes a second of each codec, as it is decoded now."""
    decoded_bytes_per_second.cache_clear()
    return {name: decoded_bytes_per_second(name, _DTYPE) for name in CODECS}
