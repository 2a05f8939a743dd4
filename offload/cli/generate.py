"""`offload generate`: text from a model that does not fit."""

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from offload.adapters.peft import load_adapters
from offload.api import offload
from offload.cli.arguments.generate import GenerateArguments, PromptGroup
from offload.cli.terminal import check_writable, live_console, progress_bar, say, typed
from offload.config import ROUNDING, Progress
from offload.generation.prompts import LEAST_SHARED_TOKENS, Prompt, Prompts, load_tokenizer
from offload.generation.sampling import Sampling, load_generation_config
from offload.generation.text import Completion, complete
from offload.json_lines import conversation, decoded, json_lines
from offload.kept_profile import kept_profile
from offload.kv.options import KvOptions
from offload.model.checkpoint_folder import find_model
from offload.model.from_pretrained import LoadingOptions
from offload.model.text_generation import check_writes_text, class_of
from offload.moe.options import ExpertOptions
from offload.probe import hardware_profile
from offload.report.live import LiveView
from offload.report.perfetto import as_perfetto
from offload.report.record import Record
from offload.report.write import write_record
from offload.session.session import Session
from offload.storage.devices.resolve import resolve_device
from offload.storage.errors import ConfigError


def run(request: GenerateArguments) -> None:
    output = request.output
    if request.prompt.batch_size < 1:
        raise ConfigError(f"--batch-size {request.prompt.batch_size} must be at least 1")
    live = output.live and sys.stderr.isatty()
    if live != output.live:
        say("--live draws in a terminal, and standard error is none: nothing is drawn")
    for path in (output.report, output.trace, request.experts.expert_trace):
        check_writable(path)
    asked = Sampling(**(vars(request.sampling) | {"stop": tuple(request.sampling.stop)}))
    texts = _read_prompts(request.prompt)
    transformers_logging.set_verbosity_error()
    folder, adapter = find_model(
        request.model, LoadingOptions.of({"revision": request.loading.revision, "gguf_file": request.loading.gguf_file})
    )
    if (kind := class_of(folder)) is not None:
        check_writes_text(kind, request.model)
    given = next(iter(request.loading.adapter), None)
    if adapter is not None and given is not None:
        raise ConfigError(f"{request.model} is an adapter, and --adapter {given} another: give the model with one")
    config = load_generation_config(folder)
    if (followed := asked.added_by(config)) and not output.quiet:
        say(f"as the model's generation config says: {followed} (--temperature 0 takes the likeliest token)")
    tokenizer = load_tokenizer(folder, request.loading.trust_remote_code)
    prompts = Prompts(tokenizer, texts, request.prompt.chat, request.prompt.system)
    completions, record = _Run(request, folder, adapter or given, prompts, asked.following(config), live).generate()
    if output.json:
        print(json.dumps({"completions": [item.to_dict() for item in completions], "report": record.report}), flush=True)
    if output.report:
        write_record(record, output.report)
    if output.trace:
        Path(output.trace).write_text(as_perfetto(record.trace))


class _Run:
    """One run of the command, all of whose options were read.

    Args:
        adapter: a PEFT adapter's folder.
        live: draw while it runs.
    """

    def __init__(
        self, request: GenerateArguments, folder: str, adapter: str | None, prompts: Prompts, sampling: Sampling, live: bool
    ) -> None:
        self._request, self._output = request, request.output
        self._folder, self._adapter = folder, adapter
        self._prompts, self._sampling = prompts, sampling
        self._live = live
        self._batch_size = min(request.prompt.batch_size, len(prompts.prompts))

    def generate(self) -> tuple[list[Completion], Record]:
        """All completions, which were printed too, and what was recorded."""
        with ExitStack() as stack:
            # The weights are read until the first pass is over: the bar is gone before the first token, which would tear it.
            bars = stack.enter_context(ExitStack())
            session = stack.enter_context(self._session(bars.enter_context(progress_bar())))
            if self._live:
                bars.close()
            model = session.model if self._adapter is None else load_adapters(session.model, self._adapter)
            view = stack.enter_context(LiveView(session.snapshot, live_console())) if self._live else None
            done = self._completed(session, model, view)
            if self._request.experts.expert_trace:
                _save_routing(session, self._request.experts.expert_trace)
            report = replace(session.report(), command=typed())
            if not (self._output.json or self._output.quiet):
                say(f"\n{report if self._output.verbose else report.summary()}")
            return done, Record.of(report, session.trace())

    def _completed(self, session: Session, model: Any, view: LiveView | None) -> list[Completion]:
        as_data = self._output.json or self._output.jsonl
        stream = None if as_data or self._batch_size > 1 or self._sampling.beams > 1 else _print_now
        shown = stream if view is None else view.add_text
        on_token = None if view is None else view.add_tokens
        caches = (session.caches_prefixes or session.shares_prefixes) and self._sampling.beams == 1
        begin = session.kv_cache if caches else None
        done: list[Completion] = []
        try:
            for completion in complete(model, self._prompts, self._sampling, self._batch_size, shown, on_token, begin):
                done.append(completion)
                if view is None:
                    self._print(completion, streamed=stream is not None)
                else:
                    view.end_text()
        finally:
            if view is not None:
                # The text was part of the view, which is gone now: after Ctrl-C, too.
                view.close()
                for completion in done:
                    self._print(completion, streamed=False)
                if view.unfinished and not as_data:
                    print(view.unfinished, flush=True)
        return done

    def _print(self, completion: Completion, streamed: bool) -> None:
        """End what was streamed with a new line; print what was not."""
        if self._output.jsonl:
            print(json.dumps(completion.to_dict()), flush=True)
        elif not self._output.json:
            print("" if streamed else completion.text, flush=True)
            if len(self._prompts.prompts) > 1:
                print(flush=True)

    def _session(self, show: Progress) -> Session:
        request, memory = self._request, self._request.memory
        device = resolve_device(memory.device)
        if kept_profile(device, memory.disk) is None:
            # Measured once for each machine and disk; kept.
            try:
                hardware_profile(device, memory.disk, progress=show)
            except (OSError, ConfigError) as error:
                say(f"the machine could not be measured, so nothing is predicted: {error}")
        shared = self._prompts.shared(self._batch_size) if request.loading.exactness == ROUNDING else 0
        kv, experts = request.kv, request.experts
        return offload(
            self._folder,
            device=memory.device,
            gpu_memory=memory.gpu_memory,
            cpu_memory=memory.cpu_memory,
            disk_dir=memory.disk,
            batch_size=self._batch_size * self._sampling.beams,
            max_tokens=self._prompts.longest + self._sampling.max_new_tokens,
            new_tokens=self._sampling.max_new_tokens,
            exactness=request.loading.exactness,
            plan=memory.plan,
            experts=ExpertOptions(experts.expert_policy, experts.expert_misses, experts.expert_prefetch),
            kv=KvOptions.parse(
                kv.kv_memory, kv.kv_policy, kv.kv_budget, shared if shared >= LEAST_SHARED_TOKENS else 0, kv.prefix_cache
            ),
            progress=show,
            dtype=request.loading.dtype,
            weights=request.loading.weights,
            weights_head=request.loading.weights_head,
            trust_remote_code=request.loading.trust_remote_code,
        )


def _save_routing(session: Session, path: str) -> None:
    routing = session.routing()
    if not routing.visits:
        say("no experts were brought one by one, so --expert-trace has nothing to write")
        return
    routing.save(path)


def _print_now(text: str) -> None:
    print(text, end="", flush=True)


def _read_prompts(asked: PromptGroup) -> list[Prompt]:
    if asked.prompt is not None:
        return [asked.prompt]
    if asked.prompts is not None:
        return _read_lines(asked.prompts)
    if sys.stdin.isatty():
        raise ConfigError("there is no prompt: give --prompt TEXT, --prompts FILE.jsonl, or text on standard input")
    text = decoded(sys.stdin.buffer.read(), "standard input").strip()
    if not text:
        raise ConfigError("standard input is empty: give --prompt TEXT, --prompts FILE.jsonl, or some text")
    return [text]


def _read_lines(path: str) -> list[Prompt]:
    prompts = [_prompt_of(where, item) for where, _, item in json_lines(path, "--prompts")]
    if not prompts:
        raise ConfigError(f"--prompts {path} holds no prompt; write one a line")
    return prompts


def _prompt_of(where: str, item: Any) -> Prompt:
    if isinstance(item, dict) and "messages" in item:
        return conversation(where, item["messages"])
    text = item.get("prompt") if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise ConfigError(f'{where} is neither a "text" nor {{"prompt": "text"}} nor {{"messages": [...]}}')
    return text
