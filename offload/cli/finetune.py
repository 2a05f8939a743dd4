"""`offload finetune`: adapters, or all weights, of a model that does not fit."""

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
from offload.cli.arguments.finetune import FinetuneArguments
from offload.cli.terminal import check_writable, progress_bar, say, typed
from offload.cli.termination import Terminated, remembered
from offload.finetune.data import Batches, check_packing, packed, read_examples
from offload.finetune.loop import Step, train
from offload.finetune.recipe import FULL, LORA, Recipe
from offload.generation.prompts import load_tokenizer
from offload.model.checkpoint_folder import find_folder
from offload.report.record import Record
from offload.report.training import TrainingEstimate, TrainingReport
from offload.report.write import write_record
from offload.storage.errors import ConfigError, gib
from offload.training.optimizer.checkpoint import read_manifest
from offload.training.options import (
    Training,
)

CHECKPOINT = "checkpoint"
"""The folder inside of --output that training is resumed from."""


def run(request: FinetuneArguments) -> None:
    recipe, training = _recipe(request), _training(request)
    if request.data.batch_size < 1 or request.data.sequence_length < 2:
        raise ConfigError("--batch-size must be at least 1 and --sequence-length at least 2")
    check_writable(request.output.report)
    output = Path(request.output.output)
    _check_output(output, request.output.resume)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = find_folder(request.model)
    tokenizer = load_tokenizer(folder, request.loading.trust_remote_code)
    batches = _batches(request, request.data.data, tokenizer)
    evaluation = _batches(request, request.data.eval_data, tokenizer) if request.data.eval_data else None
    checkpoints = output / CHECKPOINT
    with ExitStack() as stack:
        stack.enter_context(_made(checkpoints))
        with progress_bar() as show:
            session = stack.enter_context(
                offload(
                    folder,
                    device=request.memory.device,
                    gpu_memory=request.memory.gpu_memory,
                    cpu_memory=request.memory.cpu_memory,
                    disk_dir=request.memory.disk,
                    batch_size=request.data.batch_size,
                    max_tokens=max(item.longest for item in (batches, evaluation) if item is not None),
                    training=training,
                    progress=show,
                    dtype=request.loading.dtype,
                    trust_remote_code=request.loading.trust_remote_code,
                )
            )
        model = recipe.adapted(session.model)
        if request.data.packing:
            check_packing(model, batches)
        estimate = session.training_estimate(recipe.gradient_accumulation, recipe.layer_major)
        if not request.output.quiet:
            report = session.report()
            blocks = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in report.blocks.items() if count)
            peak = f"predicted peak of {'CPU' if report.device == 'cpu' else 'GPU'} memory: {gib(report.peak.predicted_bytes)}"
            kept = (
                ", and a second version on NVMe from the first checkpoint on"
                if recipe.save_every and estimate.disk_bytes
                else ""
            )
            say(f"{len(batches)} batches, {recipe.steps(batches)} steps\n{estimate}\nblocks: {blocks}; {peak}{kept}")
        watch = _Watch(recipe, estimate, recipe.steps(batches), request.output.quiet)
        with remembered() as asked, watch:
            done = train(
                session, model, batches, recipe, watch.on_step, evaluation, checkpoints, request.output.resume, asked.is_set
            )
        if done < recipe.steps(batches):
            raise Terminated(
                f"stopped after step {done} of {recipe.steps(batches)}, which is in a checkpoint; --resume goes on"
            )
        if recipe.method == LORA:
            save_adapters(model, output)
        else:
            save_model(model, tokenizer, output)
        report = replace(session.report(), training=watch.training_report(), command=typed())
        trace = session.trace()
    if not any(checkpoints.iterdir()):
        checkpoints.rmdir()
    if not request.output.quiet:
        say(f"\n{report if request.output.verbose else report.summary()}\n{_said(recipe, request.model, output)}")
    if request.output.report:
        write_record(Record.of(report, trace), request.output.report)


def _recipe(request: FinetuneArguments) -> Recipe:
    default = 2e-4 if request.adapter.method == LORA else 1e-5
    return Recipe(
        method=request.adapter.method,
        rank=request.adapter.rank,
        alpha=request.adapter.alpha,
        dropout=request.adapter.dropout,
        target_modules=request.adapter.target_modules,
        learning_rate=default if request.optimizer.learning_rate is None else request.optimizer.learning_rate,
        epochs=request.optimizer.epochs,
        max_steps=request.optimizer.max_steps,
        gradient_accumulation=request.optimizer.gradient_accumulation,
        layer_major=not request.memory.batch_major,
        max_grad_norm=request.optimizer.max_grad_norm,
        warmup=request.optimizer.warmup,
        seed=request.optimizer.seed,
        save_every=request.output.save_every,
        evaluate_every=request.data.eval_every,
    )


def _training(request: FinetuneArguments) -> Training:
    return Training(
        full=request.adapter.method == FULL,
        optimizer=request.optimizer.optimizer,
        weight_decay=request.optimizer.weight_decay,
        master_dtype=request.memory.master_dtype,
        state_tier=request.memory.state_tier,
        activation_tier=request.memory.activation_tier,
        loss_chunk=request.memory.loss_chunk,
        micro_batches=1 if request.memory.batch_major else request.optimizer.gradient_accumulation,
        state_dir=request.memory.disk or str(Path(request.output.output) / CHECKPOINT),
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


def _batches(request: FinetuneArguments, source: str, tokenizer: Any) -> Batches:
    examples = read_examples(source, tokenizer, request.data.sequence_length)
    if request.data.packing:
        examples = packed(examples, request.data.sequence_length)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Batches(examples, request.data.batch_size, request.optimizer.seed, padding)


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
