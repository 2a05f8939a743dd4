"""`offload finetune`: adapters for a model that does not fit."""

import argparse
import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from offload.api import offload
from offload.cli.terminal import check_writable, progress_bar, say
from offload.generate import load_tokenizer
from offload.model.loading import find_folder
from offload.report.record import Record, write_record
from offload.training.data import Batches, read_examples
from offload.training.finetune import Recipe, Step, save_adapters, train, with_adapters
from storage.errors import ConfigError, gib

SUMMARY = "Fine-tune a model with LoRA adapters while its weights are streamed. Writes a PEFT adapter folder."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder with a safetensors checkpoint, a hub id, or `demo`")
    add("--data", required=True, metavar="FILE.jsonl", help='lines of {"text"}, {"prompt", "completion"} or {"messages"}')
    add("--output", required=True, metavar="DIR", help="where the adapter is written")
    add("--method", default="lora", choices=("lora",), help="(default: lora)")
    add("--rank", type=int, default=16, metavar="N", help="of the adapters (default: 16)")
    add("--alpha", type=float, default=32.0, metavar="A", help="their scale is A / rank (default: 32)")
    add("--dropout", type=float, default=0.0, metavar="P", help="before the adapters (default: 0)")
    add("--target-modules", default="all-linear", metavar="NAMES", help="with commas between (default: all-linear)")
    add("--learning-rate", type=float, default=2e-4, metavar="R", help="(default: 2e-4)")
    add("--epochs", type=int, default=1, metavar="N", help="passes over the data (default: 1)")
    add("--max-steps", type=int, default=0, metavar="N", help="stop after N steps (default: all)")
    add("--sequence-length", type=int, default=512, metavar="N", help="most tokens of one example (default: 512)")
    add("--batch-size", type=int, default=1, metavar="N", help="examples that share each pass over the weights (default: 1)")
    add("--gradient-accumulation", type=int, default=1, metavar="N", help="batches that one step adds up (default: 1)")
    add("--max-grad-norm", type=float, default=1.0, metavar="X", help="gradients are scaled down to this (default: 1)")
    add("--warmup", type=int, default=0, metavar="N", help="steps in which the learning rate rises (default: 0)")
    add("--seed", type=int, default=0, metavar="N", help="of order, dropout and the adapters' start (default: 0)")
    add("--device", default="auto", metavar="DEVICE", help="auto, cuda, cuda:N or cpu (default: auto)")
    add("--gpu-memory", metavar="SIZE", help="budget on the GPU, like 8GiB (default: what is free, less 10%%)")
    add("--cpu-memory", metavar="SIZE", help="budget of CPU memory, like 24GiB (default: what is free, less a margin)")
    add("--disk", metavar="DIR", help="keeps weights that must be converted")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"), help="of the weights (default: auto)")
    add("--trust-remote-code", action="store_true", help="run model code that comes with the checkpoint (off by default)")
    add("--report", metavar="FILE", help="write the report there: .html for a page, else JSON")
    add("--quiet", action="store_true", help="print neither steps nor the report")


def run(request: argparse.Namespace) -> None:
    recipe = Recipe(
        request.rank,
        request.alpha,
        request.dropout,
        request.target_modules,
        request.learning_rate,
        request.epochs,
        request.max_steps,
        request.gradient_accumulation,
        request.max_grad_norm,
        request.warmup,
        request.seed,
    )
    if request.batch_size < 1 or request.sequence_length < 2:
        raise ConfigError("--batch-size must be at least 1 and --sequence-length at least 2")
    check_writable(request.report)
    output = Path(request.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} exists already; name a new folder")
    transformers_logging.set_verbosity_error()
    folder = find_folder(request.model)
    tokenizer = load_tokenizer(folder, request.trust_remote_code)
    examples = read_examples(request.data, tokenizer, request.sequence_length)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    batches = Batches(examples, request.batch_size, recipe.seed, padding)
    longest = max(len(example.ids) for example in examples)
    with ExitStack() as stack:
        with progress_bar() as show:
            session = stack.enter_context(
                offload(
                    folder,
                    device=request.device,
                    gpu_memory=request.gpu_memory,
                    cpu_memory=request.cpu_memory,
                    disk_dir=request.disk,
                    batch_size=request.batch_size,
                    max_tokens=longest,
                    training=True,
                    progress=show,
                    dtype=request.dtype,
                    trust_remote_code=request.trust_remote_code,
                )
            )
        adapted = with_adapters(session.model, recipe)
        trained = sum(value.numel() for value in adapted.parameters() if value.requires_grad)
        if not request.quiet:
            say(
                f"{len(examples)} examples, {recipe.steps(batches)} steps; {trained:,} of {session.report().parameters:,} "
                f"parameters are trained; {gib(session.plan.streamed_bytes)} streamed in each direction of a pass"
            )
        _train(adapted, batches, recipe, request.quiet)
        save_adapters(adapted, output)
        report = session.report()
        if not request.quiet:
            say(f"\n{report}\nthe adapter is in {output}; `offload generate {request.model} --adapter {output}` uses it")
        if request.report:
            write_record(Record.of(report, session.trace()), request.report)


def _train(adapted: object, batches: Batches, recipe: Recipe, quiet: bool) -> None:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    begun = time.perf_counter()
    tokens = 0
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("training", total=recipe.steps(batches))

        def on_step(step: Step) -> None:
            nonlocal tokens
            tokens += step.tokens
            speed = tokens / (time.perf_counter() - begun)
            line = f"step {step.number}: loss {step.loss:.4f}, gradient norm {step.gradient_norm:.3f}, {speed:.0f} tokens/s"
            bar.update(task, advance=1, description=line)
            if not quiet and not console.is_terminal:
                say(line)

        train(adapted, batches, recipe, on_step)
