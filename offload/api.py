"""`offload(...)`: what a user calls. Checks the request; the session does the rest."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from offload.config import EXACTNESS, IDENTICAL, Progress
from offload.kv.options import NONE, PLAIN, KvOptions
from offload.model.from_pretrained import TAKEN, LoadingOptions, unknown
from offload.moe.options import AUTO, CPU, ExpertOptions
from offload.planning.plan_file import load_plan
from offload.runtime.machine import Machine
from offload.scheduler.hardware import HardwareProfile
from offload.scheduler.plan import Plan
from offload.session.request import Request
from offload.session.session import Session
from offload.storage.devices.resolve import resolve_device
from offload.storage.errors import ConfigError
from offload.training.options import Training


def offload(  # noqa: PLR0913
    model_or_path: nn.Module | str | Path,
    *,
    device: str = "auto",
    gpu_memory: str | int | None = None,
    cpu_memory: str | int | None = None,
    disk_dir: str | Path | None = None,
    exactness: str = IDENTICAL,
    batch_size: int = 1,
    max_tokens: int | None = None,
    new_tokens: int | None = None,
    hardware: HardwareProfile | str | Path | None = None,
    plan: Plan | str | Path | None = None,
    training: bool | Training = False,
    machine: Machine | None = None,
    experts: ExpertOptions | None = None,
    kv: KvOptions | None = None,
    expert_policy: str = AUTO,
    expert_misses: str = AUTO,
    expert_prefetch: str = AUTO,
    kv_memory: str | int | None = None,
    kv_policy: str = NONE,
    kv_budget: str | float | int | None = None,
    prefix_cache: str | Path | None = None,
    shared_prefix: int = 0,
    progress: Progress | None = None,
    **loading: Any,
) -> Session:
    """Run a model in less memory than it takes: use as `with offload(...) as session:`.

    Args:
        model_or_path: a folder with a safetensors checkpoint, a hub id, `demo`, or a module that exists already.
        device: what computes: `auto`, `cuda`, `cuda:N` or `cpu`.
        gpu_memory: budget on the GPU, `"8GiB"` or bytes; by default what is free, less 10%.
        cpu_memory: budget of CPU memory; by default what is free, less the process and 256 MiB.
        disk_dir: where weights are written that no file holds as they are needed.
        exactness: how far the output may be from the plain model's: `identical` (the default) or `rounding`.
        batch_size: how many sequences memory is reserved for.
        max_tokens: of one sequence, prompt and answer, to reserve for; by default up to 2,048.
        new_tokens: of those, how many will be made: what the plan weighs against reading the prompt; by default half.
        hardware: a profile of this machine, or its file, that predictions are made with; by default the one that
            `offload probe` keeps, if there is one.
        plan: what lives where, or the file of `offload plan --output`; by default it is planned.
        training: backward works: each layer is computed again, with its weights brought again. `Training(...)` says how
            the session's own optimizer works.
        machine: what to run on, shared with other sessions (`open_machine`): its budgets are those of all of them, `device` is
            its own, and one forward at a time computes.
        experts: the options of experts, below, as one object in their place.
        kv: the options of the KV cache, below, as one object in their place.
        expert_policy: which experts of a mixture-of-experts model stay in device memory: `lru`, `lfu` (uses that fade),
            `admission` (the same, and copied only where it pays), `auto`; `layers` streams whole layers instead.
        expert_misses: what becomes of an expert that is not there: `load`, `cpu` (computed from CPU memory beside a GPU, of
            level rounding), `auto`.
        expert_prefetch: `auto` brings experts of the next layer ahead while a long prompt is computed; `on` also asks the next
            layer's router a layer early in decode, and brings what it names; `off` does neither.
        kv_memory: device memory for keys and values, `"2GiB"` or bytes: what does not fit goes to CPU memory and disk; by
            default all of them stay where that fits, else as many as do.
        kv_policy: `none` is exact; the others are lossy: `int8` and `int4` pages, a `window` of recent tokens, `retrieve`
            (all are kept, and each query sees those that it is likely to attend to).
        kv_budget: what a query sees by `window` and `retrieve`: a share like 0.25 (the default) or a number of tokens.
        prefix_cache: a folder where beginnings of prompts are kept for other runs: see `Session.kv_cache`.
        shared_prefix: tokens that all sequences of a batch begin with, to be kept and read once; with exactness `rounding`.
        progress: told (what, done bytes, total bytes) during long steps.
        loading: for a path, what `from_pretrained` takes (`dtype`, `revision`, `trust_remote_code`, `subfolder`, ...) and
            attributes of the config (`rope_parameters`, ...), as there. What offload decides (`device_map`, ...) is refused.

    Example:
        ::

            with offload("org/model", gpu_memory="8GiB", cpu_memory="24GiB") as session:
                output = session.model.generate(**inputs, max_new_tokens=100)

    Raises (on entering):
        ConfigError: for a request that contradicts itself.
        CheckpointError: for a checkpoint that cannot be streamed.
        BudgetTooSmall: if no plan fits; its `least_bytes` would do. Nothing is loaded then.
    """
    compiled = model_or_path if isinstance(model_or_path, nn.Module) and hasattr(model_or_path, "_orig_mod") else None
    if compiled is not None:
        model_or_path = compiled._orig_mod  # type: ignore[assignment]
    if exactness not in EXACTNESS:
        raise ConfigError(f"exactness={exactness!r} is not known; give one of {', '.join(EXACTNESS)}")
    experts = _either("experts", experts, ExpertOptions(expert_policy, expert_misses, expert_prefetch), ExpertOptions())
    kv = _either("kv", kv, KvOptions.parse(kv_memory, kv_policy, kv_budget, shared_prefix, prefix_cache), PLAIN)
    if kv.shared_tokens < 0 or (kv.shared_tokens and exactness == IDENTICAL):
        raise ConfigError(
            f"shared_prefix={kv.shared_tokens} is read once for all sequences, which rounds otherwise than the plain model; "
            "give exactness='rounding' with it"
        )
    if machine is not None and device != "auto":
        raise ConfigError(f"device={device!r} was given beside a machine, which has its own; leave one of them out")
    chosen = resolve_device(device) if machine is None else machine.device
    if experts.misses == CPU and chosen.shares_host_memory:
        raise ConfigError("expert_misses='cpu' computes experts beside a GPU, and the CPU is what computes here: leave it out")
    if batch_size < 1 or any(count is not None and count < 1 for count in (max_tokens, new_tokens)):
        raise ConfigError(f"batch_size={batch_size}, max_tokens={max_tokens} and new_tokens={new_tokens} must be at least 1")
    if training and exactness != IDENTICAL:
        raise ConfigError(f"training=True is exact, and exactness={exactness!r} was asked for; leave one of them out")
    if training and kv != PLAIN:
        raise ConfigError("training keeps no KV cache: leave kv_memory, kv_policy and kv_budget out")
    if isinstance(model_or_path, nn.Module) and any(value.is_meta for value in model_or_path.parameters()):
        raise ConfigError(
            "the model has parameters on torch's meta device, which have no values; load it first, or give its path"
        )
    if isinstance(model_or_path, nn.Module) and any(value.is_inference() for value in _tensors(model_or_path)):
        raise ConfigError(
            "the model was made under torch.inference_mode(), so that torch does not count writes to its weights, which must "
            "be seen; make it outside of that mode, or give its path"
        )
    if isinstance(model_or_path, nn.Module) and loading:
        taken = sorted(loading.keys() & TAKEN)
        if taken:
            raise ConfigError(f"{', '.join(taken)}: what from_pretrained takes is for a model that is given by its path")
        raise unknown(loading, _OPTIONS)
    return Session(
        Request(
            target=model_or_path if isinstance(model_or_path, nn.Module) else str(model_or_path),
            device=chosen,
            gpu_memory=gpu_memory,
            cpu_memory=cpu_memory,
            disk_dir=None if disk_dir is None else str(disk_dir),
            exactness=exactness,
            batch_size=batch_size,
            max_tokens=max_tokens,
            new_tokens=new_tokens,
            hardware=HardwareProfile.load(hardware) if isinstance(hardware, (str, Path)) else hardware,
            plan=load_plan(plan) if isinstance(plan, (str, Path)) else plan,
            training=Training() if training is True else training or None,
            uses_session_optimizer=isinstance(training, Training),
            machine=machine,
            experts=experts,
            kv=kv,
            progress=progress or (lambda what, done, total: None),
            loading=LoadingOptions.of(loading, _OPTIONS),
            compiled=compiled,
        )
    )


_OPTIONS = frozenset(inspect.signature(offload).parameters) - {"model_or_path", "loading"}


Options = TypeVar("Options")


def _either(name: str, given: Options | None, flat: Options, plain: Options) -> Options:
    """The options object, or the flat keywords; not both."""
    if given is None:
        return flat
    if flat != plain:
        raise ConfigError(f"{name}= was given beside keywords that it holds ({flat}); give all of them in {name}=")
    return given


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
