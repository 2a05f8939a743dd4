"""`offload finetune`: adapters, or all weights, of a model that does not fit."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from offload.adapters.peft import save_adapters, save_model
from offload.api import offload
from offload.cli.arguments.finetune import FinetuneArguments
from offload.cli.terminal import check_writable, progress_bar, say, typed
from offload.cli.termination import Terminated, remembered
from offload.cli.training_progress import TrainingProgress
from offload.config import Progress as ProgressCall
from offload.finetune.data import Batches, check_packing, packed, read_examples
from offload.finetune.loop import train
from offload.finetune.recipe import FULL, LORA, Recipe
from offload.generation.prompts import load_tokenizer
from offload.model.checkpoint_folder import find_folder
from offload.model.encoding import AS_IS
from offload.model.from_pretrained import LoadingOptions
from offload.report.record import Record
from offload.report.report import Report
from offload.report.training import TrainingEstimate
from offload.report.write import write_record
from offload.session.session import Session
from offload.storage.errors import ConfigError, counted, gib
from offload.training.optimizer.checkpoint import read_manifest
from offload.training.options import Training

CHECKPOINT = "checkpoint"
"""The folder inside of --output that training is resumed from."""


@dataclass(frozen=True, slots=True)
class _Job:
    """What one call is to train, and where to."""

    request: FinetuneArguments
    recipe: Recipe
    folder: str
    tokenizer: Any
    batches: Batches
    evaluation: Batches | None

    @property
    def output(self) -> Path:
        return Path(self.request.output.output)

    @property
    def checkpoints(self) -> Path:
        return self.output / CHECKPOINT

    @property
    def steps(self) -> int:
        return self.recipe.steps(self.batches)

    @property
    def longest(self) -> int:
        """Tokens."""
        return max(item.longest for item in (self.batches, self.evaluation) if item is not None)


def run(request: FinetuneArguments) -> None:
    job = _prepared(request)
    try:
        record = _trained(job)
    except KeyboardInterrupt as error:
        raise type(error)(f"{str(error) or 'interrupted'}; {_left_in(job.checkpoints)}") from None
    if job.checkpoints.is_dir() and not any(job.checkpoints.iterdir()):
        job.checkpoints.rmdir()
    if not request.output.quiet:
        report = Report.from_dict(record.report)
        say(f"\n{report if request.output.verbose else report.summary()}\n{_said(job.recipe, request, job.output)}")
    if request.output.report:
        write_record(record, request.output.report)


def _prepared(request: FinetuneArguments) -> _Job:
    """Read what is needed before the model; what was asked wrongly is told here."""
    recipe = _recipe(request)
    _training(request)
    if request.data.batch_size < 1 or request.data.sequence_length < 2:
        raise ConfigError("--batch-size must be at least 1 and --sequence-length at least 2")
    check_writable(request.output.report)
    _check_output(Path(request.output.output), request.output.resume)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = find_folder(request.model, LoadingOptions(gguf_file=request.loading.gguf_file))
    tokenizer = load_tokenizer(folder, request.loading.trust_remote_code)
    batches = _batches(request, request.data.data, tokenizer)
    evaluation = _batches(request, request.data.eval_data, tokenizer) if request.data.eval_data else None
    return _Job(request, recipe, folder, tokenizer, batches, evaluation)


def _trained(job: _Job) -> Record:
    """Train, and write what was trained."""
    request, recipe = job.request, job.recipe
    with _made(job.checkpoints), progress_bar() as show, _opened(job, show) as session:
        model = recipe.adapted(session.model)
        if request.data.packing:
            check_packing(model, job.batches)
        estimate = session.training_estimate(recipe.gradient_accumulation, recipe.layer_major)
        if not request.output.quiet:
            say(_outlook(job, session.report(), estimate))
        progress = TrainingProgress(recipe, estimate, job.steps, request.output.quiet)
        with remembered() as asked, progress:
            done = train(
                session,
                model,
                job.batches,
                recipe,
                progress.on_step,
                job.evaluation,
                job.checkpoints,
                request.output.resume,
                progress.on_resumed,
                asked.is_set,
            )
        if done < job.steps:
            raise Terminated(f"stopped after step {done} of {job.steps}")
        if recipe.method == LORA:
            save_adapters(model, job.output)
        else:
            save_model(model, job.tokenizer, job.output)
        report = replace(session.report(), training=progress.training_report(), command=typed())
        return Record.of(report, session.trace())


def _opened(job: _Job, show: ProgressCall) -> Session:
    request = job.request
    return offload(
        job.folder,
        device=request.memory.device,
        gpu_memory=request.memory.gpu_memory,
        cpu_memory=request.memory.cpu_memory,
        disk_dir=request.memory.disk,
        batch_size=request.data.batch_size,
        max_tokens=job.longest,
        training=_training(request),
        progress=show,
        dtype=request.loading.dtype,
        weights=request.loading.weights,
        weights_head=request.loading.weights_head,
        trust_remote_code=request.loading.trust_remote_code,
    )


def _outlook(job: _Job, report: Report, estimate: TrainingEstimate) -> str:
    """What is known before the first step."""
    steps = f"{counted(len(job.batches), 'batch', 'batches')}, {counted(job.steps, 'step')}"
    blocks = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in report.blocks.items() if count)
    peak = f"predicted peak of {'CPU' if report.device == 'cpu' else 'GPU'} memory: {gib(report.peak.predicted_bytes)}"
    versions = job.recipe.save_every and estimate.disk_bytes
    kept = ", and a second version on NVMe from the first checkpoint on" if versions else ""
    return f"{steps}\n{estimate}\nblocks: {blocks}; {peak}{kept}"


def _left_in(checkpoints: Path) -> str:
    """What of a training that was interrupted can be gone on from."""
    manifest = read_manifest(checkpoints)
    if manifest is None:
        return "there is no checkpoint of it (--save-every N writes one every N steps)"
    return f"--resume goes on from the checkpoint of step {manifest['progress'].get('step', 0)}"


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


def _said(recipe: Recipe, request: FinetuneArguments, output: Path) -> str:
    if recipe.method == LORA:
        base = {"--weights": request.loading.weights, "--weights-head": request.loading.weights_head}
        encoded = "".join(f" {name} {value}" for name, value in base.items() if value not in (None, AS_IS))
        return f"the adapter is in {output}; `offload generate {request.model} --adapter {output}{encoded}` uses it"
    return f"the model is in {output}; `offload generate {output}` uses it"
