"""`offload finetune`: adapters, or all weights, of a model that does not fit."""

import argparse
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from offload.adapters.peft import save_adapters, save_model
from offload.api import offload
from offload.cli.terminal import check_writable, progress_bar, say
from offload.cli.termination import Terminated, remembered
from offload.finetune.data import Batches, check_packing, packed, read_examples
from offload.finetune.loop import Step, train
from offload.finetune.recipe import FULL, LORA, METHODS, Recipe
from offload.generation.text import load_tokenizer
from offload.model.checkpoint_folder import find_folder
from offload.report.record import Record
from offload.report.training import TrainingEstimate, TrainingReport
from offload.report.write import write_record
from offload.storage.errors import ConfigError, gib
from offload.training.optimizer.checkpoint import read_manifest
from offload.training.options import (
    ACTIVATION_TIERS,
    ADAMW,
    CPU,
    MASTER_DTYPES,
    OPTIMIZERS,
    RECOMPUTE,
    STATE_TIERS,
    Training,
)

CHECKPOINT = "checkpoint"
"""The folder inside of --output that training is resumed from."""

SUMMARY = "Fine-tune a model while its weights are streamed: LoRA adapters (a PEFT folder), or all weights (a model's folder)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder with a safetensors checkpoint, a hub id, or `demo`")
    add(
        "--data",
        required=True,
        metavar="DATA",
        help='FILE.jsonl of {"text"}, {"prompt", "completion"} or {"messages"}; a folder of .jsonl and .txt; a hub id',
    )
    add("--output", required=True, metavar="DIR", help="where the adapter or the model is written, and checkpoints")
    add("--method", default=LORA, choices=METHODS, help="adapters, or all weights (default: lora)")
    add("--eval-data", metavar="DATA", help="evaluation data; its loss is reported, it is never trained on")
    add("--eval-every", type=int, default=0, metavar="N", help="steps from one evaluation to the next (default: at the end)")
    add("--rank", type=int, default=16, metavar="N", help="rank of the adapters (default: 16)")
    add("--alpha", type=float, default=32.0, metavar="A", help="the adapters are scaled by A / rank (default: 32)")
    add("--dropout", type=float, default=0.0, metavar="P", help="dropout in front of the adapters (default: 0)")
    add(
        "--target-modules",
        default="all-linear",
        metavar="NAMES",
        help="modules that get adapters, separated by commas (default: all-linear)",
    )
    add("--optimizer", default=ADAMW, choices=OPTIMIZERS, help="(default: adamw)")
    add("--learning-rate", type=float, metavar="R", help="(default: 2e-4 for adapters, 1e-5 for all weights)")
    add("--weight-decay", type=float, default=0.0, metavar="W", help="(default: 0)")
    add(
        "--master-dtype",
        default="float32",
        choices=MASTER_DTYPES,
        help="dtype of the master copy of 16-bit weights (default: float32)",
    )
    add("--state-tier", default=CPU, choices=STATE_TIERS, help="where optimizer state lives: cpu or nvme (default: cpu)")
    add(
        "--activation-tier",
        default=RECOMPUTE,
        choices=ACTIVATION_TIERS,
        help="where layer inputs are kept for backward: recompute, gpu, cpu, nvme (default: recompute)",
    )
    add(
        "--loss-chunk",
        type=int,
        default=0,
        metavar="N",
        help="compute the loss N tokens at a time; exactness becomes `rounding` (default: all)",
    )
    add("--epochs", type=int, default=1, metavar="N", help="passes over the data (default: 1)")
    add("--max-steps", type=int, default=0, metavar="N", help="stop after N steps (default: all)")
    add(
        "--sequence-length",
        type=int,
        default=512,
        metavar="N",
        help="most tokens of an example: longer texts are cut into several, longer answers refused (default: 512)",
    )
    add("--packing", action="store_true", help="pack several examples into one sequence, with attention masked between them")
    add("--batch-size", type=int, default=1, metavar="N", help="examples in one micro-batch (default: 1)")
    add("--gradient-accumulation", type=int, default=1, metavar="N", help="micro-batches per optimizer step (default: 1)")
    add(
        "--batch-major",
        action="store_true",
        help="load the weights once per micro-batch instead of once per step: slower, less memory, the same result",
    )
    add("--max-grad-norm", type=float, default=1.0, metavar="X", help="clip the global gradient norm to X (default: 1)")
    add("--warmup", type=int, default=0, metavar="N", help="linear warm-up steps (default: 0)")
    add("--save-every", type=int, default=0, metavar="N", help="steps from one checkpoint to the next (default: none)")
    add("--resume", action="store_true", help="go on from the checkpoint in --output, if there is one")
    add("--seed", type=int, default=0, metavar="N", help="seed for data order, dropout and adapter initialization (default: 0)")
    add("--device", default="auto", metavar="DEVICE", help="auto, cuda, cuda:N or cpu (default: auto)")
    add("--gpu-memory", metavar="SIZE", help="budget on the GPU, like 8GiB (default: what is free, less 10%%)")
    add("--cpu-memory", metavar="SIZE", help="budget of CPU memory, like 24GiB (default: what is free, less a margin)")
    add("--disk", metavar="DIR", help="keeps weights that must be converted, and states on NVMe (default for these: --output)")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="dtype of the weights (default: auto)",
    )
    add("--trust-remote-code", action="store_true", help="run model code that comes with the checkpoint (off by default)")
    add("--report", metavar="FILE", help="write the report there: .html for a page, else JSON")
    add("--quiet", action="store_true", help="print neither steps nor the report")


def run(request: argparse.Namespace) -> None:
    recipe, training = _recipe(request), _training(request)
    if request.batch_size < 1 or request.sequence_length < 2:
        raise ConfigError("--batch-size must be at least 1 and --sequence-length at least 2")
    check_writable(request.report)
    output = Path(request.output)
    _check_output(output, request.resume)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = find_folder(request.model)
    tokenizer = load_tokenizer(folder, request.trust_remote_code)
    batches = _batches(request, request.data, tokenizer)
    evaluation = _batches(request, request.eval_data, tokenizer) if request.eval_data else None
    checkpoints = output / CHECKPOINT
    with ExitStack() as stack:
        stack.enter_context(_made(checkpoints))
        with progress_bar() as show:
            session = stack.enter_context(
                offload(
                    folder,
                    device=request.device,
                    gpu_memory=request.gpu_memory,
                    cpu_memory=request.cpu_memory,
                    disk_dir=request.disk,
                    batch_size=request.batch_size,
                    max_tokens=max(item.longest for item in (batches, evaluation) if item is not None),
                    training=training,
                    progress=show,
                    dtype=request.dtype,
                    trust_remote_code=request.trust_remote_code,
                )
            )
        model = recipe.adapted(session.model)
        if request.packing:
            check_packing(model, batches)
        estimate = session.training_estimate(recipe.gradient_accumulation, recipe.layer_major)
        if not request.quiet:
            report = session.report()
            blocks = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in report.blocks.items() if count)
            peak = f"predicted peak of {'CPU' if report.device == 'cpu' else 'GPU'} memory: {gib(report.peak.predicted_bytes)}"
            kept = (
                ", and a second version on NVMe from the first checkpoint on"
                if recipe.save_every and estimate.disk_bytes
                else ""
            )
            say(f"{len(batches)} batches, {recipe.steps(batches)} steps\n{estimate}\nblocks: {blocks}; {peak}{kept}")
        watch = _Watch(recipe, estimate, recipe.steps(batches), request.quiet)
        with remembered() as asked, watch:
            done = train(session, model, batches, recipe, watch.on_step, evaluation, checkpoints, request.resume, asked.is_set)
        if done < recipe.steps(batches):
            raise Terminated(
                f"stopped after step {done} of {recipe.steps(batches)}, which is in a checkpoint; --resume goes on"
            )
        if recipe.method == LORA:
            save_adapters(model, output)
        else:
            save_model(model, tokenizer, output)
        report = replace(session.report(), training=watch.training_report())
        trace = session.trace()
    if not any(checkpoints.iterdir()):
        checkpoints.rmdir()
    if not request.quiet:
        say(f"\n{report}\n{_said(recipe, request.model, output)}")
    if request.report:
        write_record(Record.of(report, trace), request.report)


def _recipe(request: argparse.Namespace) -> Recipe:
    default = 2e-4 if request.method == LORA else 1e-5
    return Recipe(
        method=request.method,
        rank=request.rank,
        alpha=request.alpha,
        dropout=request.dropout,
        target_modules=request.target_modules,
        learning_rate=default if request.learning_rate is None else request.learning_rate,
        epochs=request.epochs,
        max_steps=request.max_steps,
        gradient_accumulation=request.gradient_accumulation,
        layer_major=not request.batch_major,
        max_grad_norm=request.max_grad_norm,
        warmup=request.warmup,
        seed=request.seed,
        save_every=request.save_every,
        evaluate_every=request.eval_every,
    )


def _training(request: argparse.Namespace) -> Training:
    return Training(
        full=request.method == FULL,
        optimizer=request.optimizer,
        weight_decay=request.weight_decay,
        master_dtype=request.master_dtype,
        state_tier=request.state_tier,
        activation_tier=request.activation_tier,
        loss_chunk=request.loss_chunk,
        micro_batches=1 if request.batch_major else request.gradient_accumulation,
        state_dir=request.disk or str(Path(request.output) / CHECKPOINT),
    )


def _check_output(output: Path, resume: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output} is a file; name a folder")
    held = {item.name for item in output.iterdir()} if output.is_dir() else set()
    checkpoint = read_manifest(output / CHECKPOINT)
    # What was trained may be there in part already: killed while it was put in place.
    if held and not (resume and (checkpoint or held == {CHECKPOINT})):
        more = ", or --resume to go on from its checkpoint" if checkpoint else ""
        raise ConfigError(f"--output {output} exists already; name a new folder{more}")


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder; what was made for it goes again where nothing came of it."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for each in new:
                each.rmdir()
        raise


def _batches(request: argparse.Namespace, source: str, tokenizer: Any) -> Batches:
    examples = read_examples(source, tokenizer, request.sequence_length)
    if request.packing:
        examples = packed(examples, request.sequence_length)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Batches(examples, request.batch_size, request.seed, padding)


def _said(recipe: Recipe, model: str, output: Path) -> str:
    if recipe.method == LORA:
        return f"the adapter is in {output}; `offload generate {model} --adapter {output}` uses it"
    return f"the model is in {output}; `offload generate {output}` uses it"


class _Watch:
    """Shows the steps while they are done, and remembers them."""

    def __init__(self, recipe: Recipe, estimate: TrainingEstimate, total: int, quiet: bool) -> None:
        self._console = Console(stderr=True)
        self._quiet = quiet
        self._recipe, self._estimate = recipe, estimate
        self._steps: list[Step] = []
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
        )
        drawn = not quiet and self._console.is_terminal
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not drawn)
        self._task = self._bar.add_task("training", total=total)

    def __enter__(self) -> None:
        self._bar.start()

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def on_step(self, step: Step) -> None:
        self._steps.append(step)
        line = f"step {step.number}: loss {step.loss:.4f}, gradient norm {step.gradient_norm:.3f}, "
        line += f"{step.tokens / step.seconds:.0f} tokens/s"
        if step.eval_loss is not None:
            line += f", evaluation {step.eval_loss:.4f}"
        self._bar.update(self._task, completed=step.number, description=line)
        if not self._quiet and not self._console.is_terminal:
            say(line)

    def training_report(self) -> TrainingReport:
        return TrainingReport(
            method=self._recipe.method,
            estimate=self._estimate,
            losses=[[step.number, step.loss] for step in self._steps],
            eval_losses=[[step.number, step.eval_loss] for step in self._steps if step.eval_loss is not None],
            tokens=sum(step.tokens for step in self._steps),
            seconds=sum(step.seconds for step in self._steps),
            step_seconds=statistics.median(step.seconds for step in self._steps) if self._steps else 0.0,
        )
