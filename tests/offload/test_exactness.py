"""Outputs equal the plain model's bit by bit, whatever is streamed. See tests/poison.py for why homes are poisoned."""

import functools
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offload import offload
from offload.runtime import block_sources
from offload.scheduler.model_spec import ModelSpec
from tests.architectures import ARCHITECTURES, BY_NAME, VOCAB, Architecture, make, oracle_of, text_inputs
from tests.budgets import ALL, NONE, SOME, SPLIT, budget_for, enter, spec_of
from tests.poison import DiskMeter, poison_homes

BATCH, MAX_TOKENS, NEW_TOKENS = 4, 24, 5

SEVERAL = [(architecture, tied) for architecture in ARCHITECTURES for tied in architecture.ties]
CASES = [
    pytest.param(architecture, tied, id=f"{architecture}-{'tied' if tied else 'untied'}") for architecture, tied in SEVERAL
]
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]

ASSISTED_BY_THEIR_OWN_KIND = {"t5", "bart", "llava"}
"""A text-only Llama drafts for the others."""


def _prompt(name: str, rows: int) -> dict[str, torch.Tensor]:
    inputs = dict(BY_NAME[name].inputs())
    inputs.pop("decoder_input_ids", None)
    return {key: value[:rows] for key, value in inputs.items()}


def _left_padded(name: str) -> dict[str, torch.Tensor]:
    inputs = _prompt(name, 2)
    mask = torch.ones_like(inputs["input_ids"])
    # The rows of a picture are not padded over.
    mask[1, : 1 if "pixel_values" in inputs else 3] = 0
    return inputs | {"attention_mask": mask}


@functools.cache
def _assistant(name: str) -> Any:
    if name in ASSISTED_BY_THEIR_OWN_KIND:
        return make(name, True, seed=9)
    torch.manual_seed(9)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    ).eval()


def run(mode: str, name: str, model: Any) -> list[torch.Tensor]:
    """What the model gives in one way of using it."""
    greedy = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    with torch.inference_mode():
        match mode:
            case "forward":
                output = model(**BY_NAME[name].inputs())
                return [value for value in output.to_tuple() if isinstance(value, torch.Tensor)]
            case "greedy":
                result = model.generate(**_prompt(name, 2), **greedy, output_logits=True, return_dict_in_generate=True)
                return [result.sequences, *result.logits]
            case "beam":
                return [model.generate(**_prompt(name, 2), **greedy, num_beams=2)]
            case "sampling":
                torch.manual_seed(11)
                return [model.generate(**_prompt(name, 2), max_new_tokens=NEW_TOKENS, do_sample=True)]
            case "static cache":
                return [model.generate(**_prompt(name, 2), **greedy, cache_implementation="static")]
            case "left padding":
                return [model.generate(**_left_padded(name), **greedy)]
            case "prompt lookup":
                return [model.generate(**_prompt(name, 1), **greedy, prompt_lookup_num_tokens=2)]
            case "assisted":
                return [model.generate(**_prompt(name, 1), **greedy, assistant_model=_assistant(name))]
    raise AssertionError(mode)


GENERATION = ("greedy", "beam", "sampling", "static cache", "left padding", "prompt lookup", "assisted")

PLAIN_TRANSFORMERS_CANNOT: set[tuple[str, str]] = set()
"""Modes in which the plain model raises: an exact runtime raises the same."""


def modes(architecture: Architecture) -> list[str]:
    wanted = ("forward", *GENERATION) if architecture.generates else ("forward",)
    return [mode for mode in wanted if (architecture.name, mode) not in PLAIN_TRANSFORMERS_CANNOT]


@functools.cache
def checkpoint(name: str, tied: bool, dtype: torch.dtype) -> tuple[Any, dict[str, list[torch.Tensor]]]:
    """A model, and what it gives in every mode without being offloaded."""
    model = oracle_of(make(name, tied, dtype))
    return model, {mode: run(mode, name, model) for mode in modes(BY_NAME[name])}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoint folders, each written once, and what the planner is told of them."""
    written: dict[Any, tuple[str, ModelSpec]] = {}

    def folder(name: str, tied: bool, dtype: torch.dtype) -> tuple[str, ModelSpec]:
        key = (name, tied, dtype)
        if key not in written:
            path = str(tmp_path_factory.mktemp("checkpoint"))
            checkpoint(*key)[0].save_pretrained(path)
            written[key] = path, spec_of(path, batch_size=BATCH, max_tokens=MAX_TOKENS)
        return written[key]

    return folder


def assert_same(got: list[torch.Tensor], wanted: list[torch.Tensor], what: str) -> None:
    assert len(got) == len(wanted)
    for index, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        assert torch.equal(mine, theirs), f"{what}: tensor {index} differs"


@pytest.mark.parametrize("residency", [NONE, SOME, ALL])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("architecture", "tied"), CASES)
def test_identical_in_every_mode(architecture, tied, dtype, residency, folders):
    _, wanted = checkpoint(architecture.name, tied, dtype)
    folder, spec = folders(architecture.name, tied, dtype)
    budget = budget_for(spec, residency, BATCH, MAX_TOKENS)
    with enter(folder, budget, batch_size=BATCH, max_tokens=MAX_TOKENS, expert_policy="layers") as session:
        poisoned = poison_homes(session)
        assert bool(poisoned) == (residency != ALL)
        assert bool(session.plan.weights.resident) or residency == NONE
        meter = DiskMeter(session)
        for mode in modes(architecture):
            assert_same(run(mode, architecture.name, session.model), wanted[mode], mode)
        assert (meter.nbytes > 0) == (residency != ALL)
        assert session.report().exactness == "identical"


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "qwen3", "bert", "t5"])
def test_identical_when_blocks_are_split(name, folders):
    tied = BY_NAME[name].ties[-1]
    _, wanted = checkpoint(name, tied, torch.float32)
    folder, spec = folders(name, tied, torch.float32)
    budget = budget_for(spec, SPLIT, BATCH, MAX_TOKENS)
    with offload(folder, device="cpu", cpu_memory=budget, batch_size=BATCH, max_tokens=MAX_TOKENS) as session:
        assert poison_homes(session)
        for mode in modes(BY_NAME[name]):
            assert_same(run(mode, name, session.model), wanted[mode], mode)
        assert any("sub-modules" in sentence for sentence in session.report().fallbacks)


@pytest.mark.parametrize("residency", [NONE, SOME, ALL])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bart", "vit"])
def test_identical_for_a_model_that_the_user_holds(name, residency, tmp_path):
    architecture = BY_NAME[name]
    tied = architecture.ties[-1]
    model = make(name, tied)
    _, wanted = checkpoint(name, tied, torch.float32)
    budget = budget_for(spec_of(model, batch_size=BATCH, max_tokens=MAX_TOKENS), residency, BATCH, MAX_TOKENS)
    with offload(model, device="cpu", cpu_memory=budget, batch_size=BATCH, max_tokens=MAX_TOKENS, disk_dir=tmp_path) as session:
        assert bool(poison_homes(session)) == (residency != ALL)
        for mode in modes(architecture):
            assert_same(run(mode, name, model), wanted[mode], mode)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bert"])
def test_the_disk_moves_exactly_what_is_streamed(name, folders):
    folder, spec = folders(name, True, torch.float32)
    budget = budget_for(spec, SOME, 2, 16)
    passes = 4
    with offload(folder, device="cpu", cpu_memory=budget, batch_size=2, max_tokens=16) as session:
        poison_homes(session)
        assert session.plan.weights.streamed
        assert not session.plan.weights.row_fetched
        meter = DiskMeter(session)
        for _ in range(passes):
            session.model(**text_inputs())
        ahead = _loaded_ahead(session)
        assert meter.nbytes == passes * session.plan.weights.streamed_bytes + ahead
        assert ahead <= session.plan.arena_bytes


def _loaded_ahead(session: Any) -> int:
    """Bytes in the slots for the pass that has not come."""
    executor = session._parts.executor
    for arrival in executor._arrivals.values():
        arrival.wait()
    stored = {block.key: block.stored_bytes for block in session.plan.weights.blocks}
    return sum(stored[key] for key in executor._schedule._leases)


def test_these_tests_fail_when_nothing_is_loaded(folders, monkeypatch):
    """A check of the checks: with the loads disabled, or the windows, no output is right."""

    class Nothing:
        def wait(self) -> dict[str, float]:
            return {}

        def cancel(self) -> None:
            pass

    _, wanted = checkpoint("llama", False, torch.float32)
    folder, spec = folders("llama", False, torch.float32)
    budget = budget_for(spec, NONE, BATCH, MAX_TOKENS)
    with monkeypatch.context() as patch:
        patch.setattr(block_sources.DirectSource, "start", lambda self, region, after: Nothing())
        with offload(folder, device="cpu", cpu_memory=budget, batch_size=BATCH, max_tokens=MAX_TOKENS) as session:
            assert poison_homes(session)
            assert not torch.equal(run("forward", "llama", session.model)[0], wanted["forward"][0])
    with monkeypatch.context() as patch:
        patch.setattr("offload.runtime.module_wrappers.OnloadedModule.wrap", lambda self, forward: forward)
        with offload(folder, device="cpu", cpu_memory=budget, batch_size=BATCH, max_tokens=MAX_TOKENS) as session:
            assert poison_homes(session)
            assert run("forward", "llama", session.model)[0].isnan().all()
