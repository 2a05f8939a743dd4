"""Claim to be checked before any claim of overlap: how far this machine can read and compute at the same time at all.

Products with weights in all threads, O_DIRECT reads by four, each alone and both at once, in this process and with nothing
of ours between them. What is left of each rate while the other runs bounds a step that computes for `c` seconds and reads
for `r`: where it is little, the larger of the two is out of anybody's reach.

    python -m benchmarks.overlap --model FOLDER --compute 1.54 --reads 1.36
"""

import argparse
import json
import statistics
from dataclasses import asdict

import torch

from benchmarks.raw_disk import beginnings
from offload.storage.contention import Contention, measure_contention
from offload.storage.io_engines.posix import PosixEngine
from offload.storage.read_speed import ReadShape

_SHAPE = ReadShape(4, 8 << 20)
_UNIT = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint folder, whose weights are read")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement (default: 4)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32, help="of the products: 1 as in decode (default: 32)")
    parser.add_argument("--compute", type=float, help="seconds that a step computes, alone")
    parser.add_argument("--reads", type=float, help="seconds that its bytes take, alone")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the products")
    request = parser.parse_args()
    ranges = [
        (path, begin // _UNIT * _UNIT, nbytes // _UNIT * _UNIT) for path, begin, nbytes in beginnings(request.model, 1 << 50)
    ]
    dtype = getattr(torch, request.dtype)
    rounds = [
        measure_contention(PosixEngine(), ranges, _SHAPE, request.seconds, dtype, request.rows) for _ in range(request.rounds)
    ]
    left = Contention(statistics.median(item.compute for item in rounds), statistics.median(item.reads for item in rounds))
    result: dict[str, object] = {"rounds": [asdict(item) for item in rounds], "left": asdict(left)}
    if request.compute and request.reads:
        result["least_step_seconds"] = left.least_seconds(request.compute, request.reads)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
