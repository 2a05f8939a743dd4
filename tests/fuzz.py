"""Damaged files of every kind, given to the commands: `python -m tests.fuzz --minutes 10 [--seed N] [--only KIND]`.

A case is well if its command succeeds, or ends with one line that says why: no traceback, no hang. Of a checkpoint the text
must be that of plain transformers on the same files, where both of them read them.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OFFLOAD_HARDWARE"] = str(Path(__file__).parent / "described_machine.json")

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from offload.cli.main import main
from offload.model.checkpoint_folder import find_folder
from offload.model.from_pretrained import LoadingOptions
from offload.scheduler.routing import COLUMNS
from tests.fp8_files import in_eight_bits
from tests.gguf_files import write_gguf

HANG_SECONDS = 10
PROMPT = "And the king said"
TOKENS = 4
GENERATE = ["--prompt", PROMPT, "--max-new-tokens", str(TOKENS), "--device", "cpu", "--cpu-memory", "24MiB"]

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 10**9, 10**30, 1.5, -0.0, 1e308, math.nan, math.inf, "", "x", "0", "../../etc/passwd",
    "<script>alert(1)</script>", "\x00", "ü" * 300, [], {}, [[]], [None], {"": None}, ["x", 1], {"type": "linear"}, [0, 10**15],
]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        file: what is damaged, in the folder of the case.
        command: given that folder, what is run on it.
        has_text: the command prints what the model says, which plain transformers can be asked too.
    """

    name: str
    file: str
    command: Callable[[Path], list[str]]
    has_text: bool = False


def generate(*more: str) -> Callable[[Path], list[str]]:
    return lambda case: ["generate", str(case / "model"), *GENERATE, *(part.replace("CASE", str(case)) for part in more)]


def tune(case: Path, output: str = "tuned") -> list[str]:
    options = [
        "--max-steps",
        "1",
        "--save-every",
        "1",
        "--sequence-length",
        "16",
        "--batch-size",
        "1",
        "--device",
        "cpu",
        "--cpu-memory",
        "64MiB",
    ]
    return ["finetune", str(case / "model"), "--data", str(case / "data.jsonl"), "--output", str(case / output), *options]


KINDS = [
    Kind("safetensors header", "model/model.safetensors", generate(), has_text=True),
    Kind("index", "sharded/model.safetensors.index.json", lambda case: ["generate", str(case / "sharded"), *GENERATE], True),
    Kind("config", "model/config.json", generate(), has_text=True),
    Kind("generation config", "model/generation_config.json", generate(), has_text=True),
    Kind("tokenizer", "model/tokenizer.json", generate(), has_text=True),
    Kind("tokenizer config", "model/tokenizer_config.json", generate(), has_text=True),
    Kind("chat template", "model/chat_template.jinja", generate("--chat")),
    Kind("adapter config", "adapter/adapter_config.json", generate("--adapter", "CASE/adapter")),
    Kind("adapter weights", "adapter/adapter_model.safetensors", generate("--adapter", "CASE/adapter")),
    Kind("manifest", "tuned/checkpoint/training.json", lambda case: [*tune(case), "--resume", "--max-steps", "2"]),
    Kind("plan", "plan.json", generate("--plan", "CASE/plan.json")),
    Kind("profile", "profile.json", lambda case: ["plan", str(case / "model"), "--hardware", str(case / "profile.json")]),
    Kind("report", "report.json", lambda case: ["report", str(case / "report.json")]),
    Kind("report page", "report.json", lambda case: ["report", str(case / "report.json"), "--output", str(case / "page.html")]),
    Kind("routing trace", "trace.csv", lambda case: ["experts", "replay", str(case / "trace.csv"), "--slots-per-layer", "2"]),
    Kind("training data", "data.jsonl", lambda case: tune(case, "anew")),
    Kind("prompts", "prompts.jsonl", lambda case: ["generate", str(case / "model"), "--prompts", str(case / "prompts.jsonl"), *GENERATE[2:]]),
    Kind("gguf", "gguf/model.gguf", lambda case: ["generate", str(case / "gguf" / "model.gguf"), *GENERATE]),
    Kind("fp8 header", "fp8/model.safetensors", lambda case: ["generate", str(case / "fp8"), *GENERATE], has_text=True),
    Kind("prefix block", "prefixes", generate("--prefix-cache", "CASE/prefixes")),
]  # fmt: skip


def prepare(folder: Path) -> None:
    """Whole files of every kind."""
    shutil.copytree(
        find_folder("demo", LoadingOptions()), folder / "model", ignore=shutil.ignore_patterns("*.py", "__pycache__")
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.save_pretrained(folder / "sharded", max_shard_size="400KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "model" / name, folder / "sharded")
    (folder / "gguf").mkdir()
    write_gguf(folder / "gguf" / "model.gguf", "llama", ["Q4_0", "Q6_K"])
    shutil.copytree(folder / "model", folder / "fp8")
    in_eight_bits(folder / "fp8")
    (folder / "model" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (folder / "data.jsonl").write_text(
        "".join(json.dumps({"text": f"{PROMPT} {word} and went away."}) + "\n" for word in "abcd")
    )
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n" + json.dumps({"prompt": "O"}) + "\n")
    shutil.copy(Path(__file__).parent / "described_machine.json", folder / "profile.json")
    rows = [",".join(COLUMNS)]
    rows += [f"0,{int(step > 0)},{step},{layer},0,{(step + layer) % 4},0.5,0,100" for step in range(4) for layer in range(2)]
    (folder / "trace.csv").write_text("\n".join(rows) + "\n")
    _well(["plan", str(folder / "model"), "--hardware", str(folder / "profile.json"), "--output", str(folder / "plan.json")])
    _well([*generate("--report", "CASE/report.json")(folder)])
    _well(tune(folder))
    shutil.copytree(folder / "tuned", folder / "adapter", ignore=shutil.ignore_patterns("checkpoint*"))
    prompt = " ".join([PROMPT] * 80)
    _well(["generate", str(folder / "model"), "--prompt", prompt, *GENERATE[2:], "--prefix-cache", str(folder / "prefixes")])


def _well(arguments: list[str]) -> None:
    status, output = run(arguments)
    if status:
        raise SystemExit(f"{' '.join(arguments)} ends with {status} before anything is damaged:\n{output}")


class Hang(BaseException):
    """A command took longer than any of these should."""


def run(arguments: list[str], limit_seconds: int = 0) -> tuple[int, str]:
    """A command's status and output; an exception that it lets through is raised, and Hang after a limit that is not 0."""
    if not limit_seconds:
        return _run(arguments)

    def late(number: int, frame: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(limit_seconds)
    try:
        return _run(arguments)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _run(arguments: list[str]) -> tuple[int, str]:
    out = io.StringIO()
    # Standard output is closed where its reader is gone, and has to be a file for that.
    with tempfile.TemporaryFile("w+") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(out):
        status = main(arguments)
        said.seek(0)
        return status, said.read() + out.getvalue()


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file; what was done."""
    if path.is_dir():
        path = rng.choice(sorted(item for item in path.rglob("*") if item.is_file()))
    content = path.read_bytes()
    if path.suffix == ".safetensors" and rng.random() < 0.7:
        length = int.from_bytes(content[:8], "little")
        header, what = _edited(json.loads(content[8 : 8 + length]), rng)
        text = header.encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        return what
    if path.suffix == ".json" and rng.random() < 0.8:
        text, what = _edited(json.loads(content), rng)
        path.write_text(text)
        return what
    return _bytes_damaged(path, content, rng)


def _edited(content: Any, rng: random.Random) -> tuple[str, str]:
    content = copy.deepcopy(content)
    places = list(_places(content))
    holder, key = rng.choice(places) if places else ({"": None}, "")
    match rng.randrange(6):
        case 0 if isinstance(holder, dict):
            del holder[key]
            return json.dumps(content), f"without {key!r}"
        case 1:
            holder[key] = "NEST"
            deep = "[" * 3000 + "]" * 3000
            return json.dumps(content).replace('"NEST"', deep, 1), f"{key!r} nested 3,000 deep"
        case 2 if isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
            holder[key] = rng.choice([holder[key] + 1, holder[key] * 2, -holder[key], holder[key] / 2])
        case _:
            holder[key] = rng.choice(VALUES)
    return json.dumps(content), f"{key!r} = {str(holder[key])[:60]!r}"


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    keys = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in list(keys)[:200]:
        yield content, key
        yield from _places(content[key])


def _bytes_damaged(path: Path, content: bytes, rng: random.Random) -> str:
    at = rng.randrange(len(content) + 1)
    match rng.randrange(6):
        case 0:
            path.write_bytes(content[:at])
            return f"cut at {at}"
        case 1:
            path.write_bytes(b"")
            return "empty"
        case 2:
            path.unlink()
            path.mkdir()
            return "a folder in its place"
        case 3:
            path.write_bytes(content[:at] + bytes(rng.randrange(256) for _ in range(8)) + content[at + 8 :])
            return f"8 bytes at {at}"
        case 4:
            path.write_bytes(
                content[:at] + rng.choice([b"{{", b"{% raise %}", b"\xff\xfe", b'"', b"\n\n", b",,,"]) + content[at:]
            )
            return f"something more at {at}"
    lines = content.split(b"\n")
    rng.shuffle(lines)
    path.write_bytes(b"\n".join(lines))
    return "lines shuffled"


def plain_text(folder: Path) -> str | None:
    """What plain transformers says; None where it cannot."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        if told["missing_keys"] or told["mismatched_keys"]:
            return None
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids
        greedy = {"max_new_tokens": TOKENS, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        with torch.no_grad():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=pad, **greedy)
        return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    except Exception:
        return None


def tried(kind: Kind, whole: Path, seed: int, limit_seconds: int = 0) -> tuple[str, str]:
    """Run one case; `well`, or what is wrong, and the details."""
    rng = random.Random(f"{kind.name} {seed}")
    with tempfile.TemporaryDirectory() as folder:
        case = Path(folder) / "case"
        shutil.copytree(whole, case)
        what = damage(case / kind.file, rng)
        command = kind.command(case)
        try:
            status, output = run(command, limit_seconds)
        except Hang:
            return "hang", what
        except BaseException:
            return "traceback", f"{what}\n{traceback.format_exc()[-1500:]}"
        page = case / "page.html"
        if page.is_file() and "<script>alert" in page.read_text():
            return "script in a page", what
        last = output.strip().splitlines()[-1] if output.strip() else ""
        if status and ("Traceback" in output or not last.startswith(("offload", "usage"))):
            return "no sentence", f"{what}: {output[-300:]}"
        if not status and kind.has_text:
            theirs = plain_text(Path(command[1]))
            if theirs is not None and theirs.strip() not in output:
                return "another text", f"{what}: {theirs!r} is not in {output[-300:]!r}"
        return ("well" if status else "done"), f"{what}: {last[:150]}"


def fuzz(minutes: float, seed: int, only: str | None = None, verbose: bool = False) -> int:
    """Try cases until the time is over; the number of those that are not well."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        whole.mkdir()
        prepare(whole)
        end = time.monotonic() + 60 * minutes
        kinds = [kind for kind in KINDS if only in (None, kind.name)]
        while time.monotonic() < end:
            for kind in kinds:
                outcome, details = tried(kind, whole, seed, HANG_SECONDS)
                counts[kind.name, outcome] += 1
                if verbose or outcome not in ("well", "done"):
                    print(f"{outcome}: {kind.name}, seed {seed}: {details}", flush=True)
            seed += 1
    for kind in kinds:
        print(f"{kind.name:20}", {outcome: count for (name, outcome), count in sorted(counts.items()) if name == kind.name})
    return sum(count for (_, outcome), count in counts.items() if outcome not in ("well", "done"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[kind.name for kind in KINDS])
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    sys.exit(min(1, fuzz(given.minutes, given.seed, given.only, given.verbose)))
