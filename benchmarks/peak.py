"""Is the predicted peak of memory right, and never too low?

Generates in a fresh process in a fresh control group, for several budgets and shapes, and sets the most anonymous memory
that the group held (sampled) beside what was predicted: the process before the session, and the report's predicted peak.
Needs root.

    python -m benchmarks.peak --model DIR [--output FILE.json]
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.memory_group import MemoryGroup, evict

_RUNS = (
    # Share of the weights, batch size, prompt tokens, new tokens.
    (0.3, 1, 64, 8),
    (0.45, 1, 64, 8),
    (0.65, 1, 512, 8),
    (0.45, 8, 128, 8),
    (0.65, 4, 256, 8),
    (1.2, 2, 128, 8),
)
_ROOM_BYTES = 1 << 30

_GENERATE = """
import json, sys, torch
from offload import offload
folder, budget, batch_size, prompt, new = sys.argv[1], *map(int, sys.argv[2:])
tokens = torch.randint(10, 200, (batch_size, prompt))
reserve = {"batch_size": batch_size, "max_tokens": prompt + new, "new_tokens": new}
with offload(folder, device="cpu", cpu_memory=budget, **reserve) as session, torch.inference_mode():
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    session.model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)
    report = session.report()
print(json.dumps({"process": report.process_bytes, "predicted": report.peak.predicted_bytes,
                  "seen": report.peak.measured_bytes}))
"""


def peaks(folder: str) -> list[dict[str, Any]]:
    total = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    rows = []
    for share, batch_size, prompt, new in _RUNS:
        budget = int(total * share)
        evict(folder)
        command = [sys.executable, "-c", _GENERATE, folder, *map(str, (budget, batch_size, prompt, new))]
        with MemoryGroup(budget + _ROOM_BYTES) as group:
            done, held = group.run(command, env={**os.environ, "PYTHONPATH": os.getcwd()})
        if done.returncode:
            raise RuntimeError(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        measured = held - found["process"]
        row = {"budget": share, "batch": batch_size, "prompt": prompt, "measured": measured} | found
        rows.append(row | {"error": found["predicted"] / measured - 1})
        print(
            f"budget {share:4.0%} of the weights, batch {batch_size}, prompt {prompt:3}: predicted "
            f"{found['predicted'] / 1e6:7.1f} MB, measured {measured / 1e6:7.1f} MB ({rows[-1]['error']:+.1%}); "
            f"the report saw {found['seen'] / 1e6:7.1f} MB",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint of some GB")
    parser.add_argument("--output", metavar="FILE.json")
    request = parser.parse_args()
    rows = peaks(request.model)
    if request.output:
        Path(request.output).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
