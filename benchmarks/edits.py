"""What it costs to see edits of weights: asking the kernel before each pass, and digests of what is resident.

python -m benchmarks.edits [--size 2GiB]
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from offload.config import parse_bytes
from offload.storage import written_pages
from offload.storage.digest import digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="2GiB")
    size = parse_bytes(parser.parse_args().size)
    assert size is not None
    with tempfile.NamedTemporaryFile() as file:
        os.truncate(file.name, size)
        mapped = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage.from_file(file.name, False, size))
        begin = mapped.data_ptr()
        show_asking("nothing touched", begin, size)
        mapped[: size // 2].sum()
        show_asking("half of it read", begin, size)
    resident = torch.ones(size // 4, dtype=torch.uint8)
    print(f"digest: {resident.nbytes / seconds_of(lambda: digest(resident)) / 1e9:.2f} GB/s")


def show_asking(what: str, begin: int, size: int) -> None:
    descriptor = os.open("/proc/self/pagemap", os.O_RDONLY)
    for name, ask in (("PAGEMAP_SCAN", written_pages._any), ("reading pagemap", written_pages._read)):
        print(f"{what}, {name}: {1e3 * seconds_of(lambda ask=ask: ask(descriptor, begin, begin + size)):.3f} ms")  # type: ignore[misc]
    os.close(descriptor)


def seconds_of(run: Callable[[], Any]) -> float:
    """The best of five."""
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begun)
    return best


if __name__ == "__main__":
    main()
