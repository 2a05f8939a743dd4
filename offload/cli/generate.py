"""`offload generate`: text from a model that does not fit."""

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from offload.adapters.peft import load_adapters
from offload.api import offload
from offload.cli.shared_options import add_expert_arguments, add_kv_arguments, expert_options, kv_options
from offload.cli.terminal import check_writable, live_console, progress_bar, say
from offload.config import EXACTNESS, ROUNDING, Progress, resolve_device
from offload.generation.text import LEAST_SHARED_TOKENS, Completion, Prompts, Sampling, complete, load_tokenizer
from offload.json_lines import decoded, json_lines
from offload.kept_profile import kept_profile
from offload.model.checkpoint_folder import find_model
from offload.model.from_pretrained import LoadingOptions
from offload.probe import hardware_profile
from offload.report.live import LiveView
from offload.report.perfetto import as_perfetto
from offload.report.record import Record
from offload.report.write import write_record
from offload.session.session import Session
from offload.storage.errors import ConfigError

SUMMARY = "Generate text. Tokens go to stdout as they are made, the report to stderr."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder with a safetensors checkpoint, a hub id, or `demo`")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue; by default standard input")
    prompt.add_argument("--prompts", metavar="FILE.jsonl", help='a prompt a line: "text" or {"prompt": "text"}')
    add("--chat", action="store_true", help="treat each prompt as a message and use the model's chat template")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="stop after N tokens (default: 128)")
    add("--batch-size", type=int, default=1, metavar="N", help="prompts that share each pass over the weights (default: 1)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default: 0)")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens that add up to P, with --temperature (default: 1)",
    )
    add("--seed", type=int, metavar="N", help="makes draws repeatable (with --temperature)")
    add("--device", default="auto", metavar="DEVICE", help="auto, cuda, cuda:N or cpu (default: auto)")
    add("--gpu-memory", metavar="SIZE", help="budget on the GPU, like 8GiB (default: what is free, less 10%%)")
    add(
        "--cpu-memory",
        metavar="SIZE",
        help="budget of CPU memory, like 24GiB; the only one on a CPU (default: what is free, less a margin)",
    )
    add(
        "--disk",
        metavar="DIR",
        help="keeps weights that must be converted, and the KV cache's pages while it runs (default: $TMPDIR, nothing kept)",
    )
    add("--adapter", metavar="DIR", help="a PEFT adapter for the model, from `offload finetune`")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="dtype of the weights (default: auto)",
    )
    add("--revision", metavar="REV", help="branch, tag or commit, of a hub id")
    add("--trust-remote-code", action="store_true", help="run model code that comes with the checkpoint (off by default)")
    add(
        "--exactness",
        default="identical",
        choices=EXACTNESS,
        help="rounding allows other orders of computing (default: identical)",
    )
    add_expert_arguments(add)
    add("--expert-trace", metavar="FILE.csv", help="write which experts each token chose, for `offload experts replay`")
    add_kv_arguments(add)
    add(
        "--prefix-cache",
        metavar="DIR",
        help="cache the KV of prompt prefixes in DIR, across runs (created if missing); exactness becomes `rounding`",
    )
    add("--plan", metavar="FILE.json", help="what lives where, from `offload plan --output` (default: planned here)")
    add("--report", metavar="FILE", help="write the report there: .html for a page, else JSON that `offload report` reads")
    add("--trace", metavar="FILE.json", help="write what happened when, for ui.perfetto.dev")
    add("--live", action="store_true", help="show memory, links and stalls in the terminal while it runs")
    add("--quiet", action="store_true", help="do not print the report")
    add("--json", action="store_true", help="print one JSON object (completions and report) at the end instead")


def run(request: argparse.Namespace) -> None:
    if request.batch_size < 1:
        raise ConfigError(f"--batch-size {request.batch_size} must be at least 1")
    if request.live and not sys.stderr.isatty():
        say("--live draws in a terminal, and standard error is none: nothing is drawn")
        request.live = False
    for path in (request.report, request.trace, request.expert_trace):
        check_writable(path)
    sampling = Sampling(request.max_new_tokens, request.temperature, request.top_p, request.seed)
    texts = _read_prompts(request.prompt, request.prompts)
    transformers_logging.set_verbosity_error()
    folder, adapter = find_model(request.model, LoadingOptions.of({"revision": request.revision}))
    if adapter is not None and request.adapter is not None:
        raise ConfigError(f"{request.model} is an adapter, and --adapter {request.adapter} another: give the model with one")
    request.adapter = adapter or request.adapter
    prompts = Prompts(load_tokenizer(folder, request.trust_remote_code), texts, request.chat)
    completions, record = _generate(request, folder, prompts, sampling)
    if request.json:
        items = [{"prompt": item.prompt, "text": item.text, "new_tokens": item.new_tokens} for item in completions]
        print(json.dumps({"completions": items, "report": record.report}), flush=True)
    if request.report:
        write_record(record, request.report)
    if request.trace:
        Path(request.trace).write_text(as_perfetto(record.trace))


def _generate(
    request: argparse.Namespace, folder: str, prompts: Prompts, sampling: Sampling
) -> tuple[list[Completion], Record]:
    batch_size = min(request.batch_size, len(prompts.texts))
    with ExitStack() as stack:
        # The weights are read until the first pass is over: the bar is gone before the first token, which would tear it.
        bars = stack.enter_context(ExitStack())
        show = bars.enter_context(progress_bar())
        session = stack.enter_context(_session(request, folder, batch_size, prompts, sampling, show))
        if request.live:
            bars.close()
        model = session.model if request.adapter is None else load_adapters(session.model, request.adapter)
        view = stack.enter_context(LiveView(session.snapshot, live_console())) if request.live else None
        done = []
        stream = None if request.json or batch_size > 1 else _print_now
        begin = session.kv_cache if session.caches_prefixes or session.shares_prefixes else None
        if view is not None:
            stream = view.add_text
        on_token = None if view is None else view.add_tokens
        for completion in complete(model, prompts, sampling, batch_size, stream, on_token, begin):
            done.append(completion)
            if not request.json and view is None:
                _print_rest(completion, len(prompts.texts) > 1, streamed=stream is not None)
        if view is not None:
            # The text was part of the view, which is gone now.
            view.close()
            for completion in () if request.json else done:
                _print_rest(completion, len(prompts.texts) > 1, streamed=False)
        if request.expert_trace:
            _save_routing(session, request.expert_trace)
        report = session.report()
        if not (request.json or request.quiet):
            say(f"\n{report}")
        return done, Record.of(report, session.trace())


def _save_routing(session: Session, path: str) -> None:
    routing = session.routing()
    if not routing.visits:
        say("no experts were brought one by one, so --expert-trace has nothing to write")
        return
    routing.save(path)


def _session(
    request: argparse.Namespace, folder: str, batch_size: int, prompts: Prompts, sampling: Sampling, show: Progress
) -> Session:
    device = resolve_device(request.device)
    if kept_profile(device, request.disk) is None:
        # Measured once for each machine and disk; kept.
        try:
            hardware_profile(device, request.disk, progress=show)
        except (OSError, ConfigError) as error:
            say(f"the machine could not be measured, so nothing is predicted: {error}")
    shared = prompts.shared(batch_size) if request.exactness == ROUNDING else 0
    return offload(
        folder,
        device=request.device,
        gpu_memory=request.gpu_memory,
        cpu_memory=request.cpu_memory,
        disk_dir=request.disk,
        batch_size=batch_size,
        max_tokens=prompts.longest + sampling.max_new_tokens,
        new_tokens=sampling.max_new_tokens,
        exactness=request.exactness,
        plan=request.plan,
        experts=expert_options(request),
        kv=kv_options(request, shared if shared >= LEAST_SHARED_TOKENS else 0, request.prefix_cache),
        progress=show,
        dtype=request.dtype,
        trust_remote_code=request.trust_remote_code,
    )


def _print_now(text: str) -> None:
    print(text, end="", flush=True)


def _print_rest(completion: Completion, several: bool, streamed: bool) -> None:
    """End what was streamed with a new line; print what was not."""
    print("" if streamed else completion.text, flush=True)
    if several:
        print(flush=True)


def _read_prompts(prompt: str | None, path: str | None) -> list[str]:
    if prompt is not None:
        return [prompt]
    if path is not None:
        return _read_lines(path)
    if sys.stdin.isatty():
        raise ConfigError("there is no prompt: give --prompt TEXT, --prompts FILE.jsonl, or text on standard input")
    text = decoded(sys.stdin.buffer.read(), "standard input").strip()
    if not text:
        raise ConfigError("standard input is empty: give --prompt TEXT, --prompts FILE.jsonl, or some text")
    return [text]


def _read_lines(path: str) -> list[str]:
    prompts = [_prompt_of(where, item) for where, _, item in json_lines(path, "--prompts")]
    if not prompts:
        raise ConfigError(f"--prompts {path} holds no prompt; write one a line")
    return prompts


def _prompt_of(where: str, item: Any) -> str:
    text = item.get("prompt") if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise ConfigError(f'{where} is neither a "text" nor {{"prompt": "text"}}')
    return text
