"""Is a budget kept in anonymous memory, seen from outside of the process?

base: RssAnon, after malloc_trim and the least of three, of a process that entered and left a session on a model of one layer:
what Python, torch and its kernels keep. excess: the most RssAnon of a run on the whole model, sampled every 5 ms by another
process, less the base, less the budget. The bar is 24 MiB for generation and 48 MiB for training.

    python -m benchmarks.anonymous [--only WORD] [--output FILE.json]
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.checkout import commit
from benchmarks.memory_group import evict
from offload import Training, offload
from offload.synth import synthesize

MIB = 1 << 20
MODEL_BYTES = 115_000_000
BARS = {"generate": 24, "train": 48}
_SAMPLE_SECONDS = 0.005


@dataclass(frozen=True)
class Case:
    """One kind of run.

    Attributes:
        budget_mib: of CPU memory.
        prompt: tokens of each sequence.
        trains: "" to generate, "lora" or "full".
    """

    name: str
    family: str
    budget_mib: int
    batch: int
    prompt: int
    dtype: str = "bfloat16"
    trains: str = ""


CASES = [
    Case("llama, one sequence", "llama", 70, 1, 64),
    Case("llama, a batch", "llama", 90, 4, 300),
    Case("llama, fp32", "llama", 70, 1, 64, "float32"),
    Case("llama, everything resident", "llama", 200, 1, 200),
    Case("gemma, a long prompt", "gemma3", 110, 1, 1500),
    Case("mixture, one sequence", "qwen3_moe", 70, 1, 64),
    Case("mixture, a prompt of 3,000 tokens", "qwen3_moe", 160, 1, 3000),
    Case("mixture, a batch", "qwen3_moe", 100, 4, 200),
    Case("LoRA", "llama", 110, 2, 128, trains="lora"),
    Case("LoRA, mixture", "qwen3_moe", 130, 2, 128, trains="lora"),
    Case("all weights", "llama", 1000, 2, 128, trains="full"),
]


def model_of(folder: Path, case: Case) -> None:
    synthesize(str(folder), MODEL_BYTES, family=case.family, dtype=case.dtype)


def one_layer_of(folder: Path, whole: Path) -> None:
    """The first layer of a model, with what is around it."""
    config = AutoConfig.from_pretrained(whole)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    AutoModelForCausalLM.from_config(config, dtype=config.dtype).save_pretrained(folder)


def run(folder: str, case: Case, budget_mib: int) -> None:
    """What the measured process does inside of one session."""
    tokens = torch.randint(10, 200, (case.batch, case.prompt), generator=torch.Generator().manual_seed(0))
    reserve: dict[str, Any] = {"batch_size": case.batch, "max_tokens": case.prompt + 8}
    if not case.trains:
        with offload(folder, device="cpu", cpu_memory=budget_mib * MIB, new_tokens=8, **reserve) as session:
            options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
            for _ in range(2):
                session.model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)
        return
    training = Training(full=case.trains == "full")
    with offload(folder, device="cpu", cpu_memory=budget_mib * MIB, training=training, **reserve) as session:
        model = session.model
        if case.trains == "lora":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"])).train()
        for _ in range(3):
            session.backward([lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss])
            session.step()


def anonymous_bytes(process: int | str) -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"process {process} has no RssAnon")


def _child(role: str, folder: str, case: Case) -> None:
    torch.randn(256, 256) @ torch.randn(256, 256)
    run(folder, case, 1 << 11 if role == "base" else case.budget_mib)
    if role == "base":
        seen = []
        for _ in range(3):
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            time.sleep(0.1)
            seen.append(anonymous_bytes("self"))
        print(min(seen))


def peak_of(command: Sequence[str]) -> int:
    """The most RssAnon of a process, seen from here."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    most = 0
    while process.poll() is None:
        try:
            most = max(most, anonymous_bytes(process.pid))
        except (OSError, RuntimeError):
            break
        time.sleep(_SAMPLE_SECONDS)
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors[-2000:])
    return most


def measured(case: Case, folder: Path) -> dict[str, Any]:
    model_of(folder / "whole", case)
    one_layer_of(folder / "one", folder / "whole")
    evict(str(folder / "whole"))
    command = [sys.executable, "-m", "benchmarks.anonymous", "--child"]
    about = json.dumps(asdict(case))
    base = int(
        subprocess.run([*command, "base", str(folder / "one"), about], capture_output=True, text=True, check=True).stdout
    )
    peak = peak_of([*command, "run", str(folder / "whole"), about])
    excess = (peak - base) / MIB - case.budget_mib
    bar = BARS["train" if case.trains else "generate"]
    return asdict(case) | {"base_mib": base / MIB, "peak_mib": peak / MIB, "excess_mib": excess, "bar_mib": bar}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--output", metavar="FILE.json")
    parser.add_argument("--child", nargs=3, metavar=("ROLE", "FOLDER", "CASE"), help=argparse.SUPPRESS)
    request = parser.parse_args()
    if request.child:
        role, folder, about = request.child
        _child(role, folder, Case(**json.loads(about)))
        return
    rows = []
    for case in CASES:
        if request.only in case.name:
            with tempfile.TemporaryDirectory() as folder:
                row = measured(case, Path(folder))
            rows.append(row)
            print(
                f"{case.name:36} budget {case.budget_mib:4} MiB   base {row['base_mib']:6.1f}   peak {row['peak_mib']:6.1f}   "
                f"excess {row['excess_mib']:+6.1f} MiB of {row['bar_mib']}",
                flush=True,
            )
    if request.output:
        Path(request.output).write_text(json.dumps({"commit": commit(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
