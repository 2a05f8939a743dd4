"""Fills docs/verification.md with what was measured on cards.

    python -m benchmarks.verified [FOLDER]

FOLDER is what benchmarks/gpu.sh filled: its JSON goes to benchmarks/results under the card's name, with what the machine is and
how many tests passed. Then the table of figures is written anew, from all results there are; without FOLDER, that is all.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "verification.md"
BEGIN, END = "<!-- figures of cards: benchmarks.verified writes them -->", "<!-- end of the figures -->"

Figures = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    request = parser.parse_args()
    if request.folder:
        keep(request.folder)
    PAGE.write_text(filled(PAGE.read_text()))


def keep(folder: Path) -> None:
    """Take a run's results over."""
    found = json.loads((folder / "gpu.json").read_text())
    name = short(found["card"]).lower().replace(" ", "-")
    found["tests"] = tests_in(folder / "tests.txt")
    (RESULTS / f"gpu-{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / f"gpu-{name}-machine.txt").write_text((folder / "machine.txt").read_text())
    if (folder / "kv-gpu.json").exists():
        paged = {key: found[key] for key in ("card", "date", "commit")} | json.loads((folder / "kv-gpu.json").read_text())
        (RESULTS / f"kv-gpu-{name}.json").write_text(json.dumps(paged, indent=1) + "\n")


def short(card: str) -> str:
    """`H100` of `NVIDIA H100 80GB HBM3`, `GeForce RTX 4090` of `NVIDIA GeForce RTX 4090`."""
    return re.split(r" \d+GB", card.removeprefix("NVIDIA "))[0]


def tests_in(output: Path) -> str:
    """`236 passed, 2 skipped`."""
    told = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", output.read_text()) if output.exists() else []
    return ", ".join(told)


def filled(page: str) -> str:
    """The page with the table of all results between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def table() -> str:
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu-*.json"))]
    paged = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("kv-gpu-*.json"))]
    lines = ["| What | Card, date, commit | Figures |", "|---|---|---|"]
    for case, tell in TOLD.items():
        for run in runs:
            if case in run["median"]:
                lines.append(f"| {case}, {run['request']['size']} | {place(run)} | {tell(run['median'][case])} |")
    lines += [f"| KV pages, an eighth on the card | {place(run)} | {of_pages(run['median'])} |" for run in paged]
    lines += [f"| tests | {place(run)} | {run['tests']} |" for run in runs if run.get("tests")]
    return "\n".join(lines)


def place(run: Figures) -> str:
    return f"{short(run['card'])}, {run['date']}, {run['commit']}"


def of_decode(case: Figures) -> str:
    return (
        f"{seconds(case['seconds_per_token'])} a token, {case['link_share']:.2f} of the link; predicted "
        f"{case['predicted_seconds_per_token_error']:+.0%}; peak predicted {case['peak_error']:+.1%}"
    )


def of_training(case: Figures) -> str:
    resident = case.get("resident_seconds_a_step")
    beside = f", {seconds(resident)} with all weights on the card" if resident else ""
    return f"{seconds(case['seconds_a_step'])} a step{beside}; {case['link_share']:.2f} of the link"


def of_prefill(case: Figures) -> str:
    resident = case.get("resident_seconds")
    beside = f", {seconds(resident)} with all weights on the card" if resident else ""
    return f"{seconds(case['seconds'])}{beside}; {case['link_share']:.2f} of the link"


def of_windows(case: Figures) -> str:
    return f"an onload scope costs {seconds(case['overhead_seconds_a_layer'])} a layer"


def of_mixture(case: Figures) -> str:
    return f"{seconds(case['seconds_per_token'])} a token; whole layers {seconds(case['layers_seconds_per_token'])}"


def of_pages(case: Figures) -> str:
    return ", ".join(f"{told} {seconds(case[name])}" for name, told in WAYS_TO_PAGE.items() if name in case) + " a token"


def seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} µs"


WAYS_TO_PAGE = {
    "identical": "put together",
    "rounding": "piece by piece",
    "transformers_offloaded": "transformers' offloaded cache",
    "resident": "all on the card",
}

TOLD: dict[str, Callable[[Figures], str]] = {
    "from CPU memory": of_decode,
    "from disk": of_decode,
    "a card of 8 GB": of_decode,
    "a card of 24 GB": of_decode,
    "CPU and card": of_decode,
    "accelerate": lambda case: f"{seconds(case['seconds_per_token'])} a token",
    "nothing streamed": of_windows,
    "prefill": of_prefill,
    "LoRA": of_training,
    "full": of_training,
    "mixture": of_mixture,
}


if __name__ == "__main__":
    main()
