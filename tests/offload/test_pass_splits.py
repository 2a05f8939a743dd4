"""Passes taken apart: micro-batches inside of a layer, chunks of a prompt, products that device and CPU share."""

import time

import pytest
import torch
from torch import nn

from offload import BudgetTooSmall, PlanError, offload
from offload.model.micro_batch import MicroBatches
from offload.planning.dry_run import DryRun
from offload.planning.operations import DryRunFailed
from offload.planning.pass_splits import ways_to_split
from offload.runtime.module_wrappers import OnloadedModule
from offload.scheduler.model_spec import Workload
from tests.architectures import BY_NAME, VOCAB, make, oracle_of
from tests.budgets import NONE, budget_for, spec_of
from tests.delayed import DelayedDevice
from tests.plans import edited

BATCH, MAX_TOKENS = 6, 40
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
IN_PARTS = [
    "llama",
    "qwen2",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt2",
    "gpt_neox",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "llava",
    "falcon",
]
DIVIDED = ["llama", "qwen2", "gemma3", "gpt_neox", "t5", "bart", "mixtral", "opt"]


def padded(rows=BATCH, length=9):
    """Prompts of different lengths, padded on the left."""
    ids = torch.randint(3, VOCAB - 1, (rows, length), generator=torch.Generator().manual_seed(8))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % 4] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def plan_of(model, **reserve):
    with offload(model, device="cpu", cpu_memory="1GiB", **reserve) as session:
        return session.plan


def answers(model, inputs, **options):
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True} | options
    return model.generate(**inputs, **options)


def assert_same(found, wanted):
    assert torch.equal(found.sequences, wanted.sequences)
    for ours, theirs in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", IN_PARTS)
def test_micro_batches_compute_the_same(name, size):
    model = make(name)
    twin = oracle_of(model)
    inputs = padded()
    plan = edited(plan_of(model, batch_size=BATCH, max_tokens=MAX_TOKENS), "splits", micro_batch=size)
    calls: list[tuple[int, int]] = []
    with offload(
        model, device="cpu", cpu_memory="1GiB", plan=plan, exactness="rounding", batch_size=BATCH, max_tokens=MAX_TOKENS
    ) as session:
        inner = _last_layer(session, calls)
        assert_same(answers(model, inputs), answers(twin, inputs))
        assert_same(answers(model, inputs, num_beams=2), answers(twin, inputs, num_beams=2))
        report = session.report()
        inner.remove()
    assert report.exactness == "rounding"
    assert report.parts["micro_batch"] == size
    assert report.parts["decode_micro_batch"] == session.plan.splits.decode_micro_batch
    assert not any("as a whole" in sentence for sentence in report.fallbacks)
    assert max(rows for rows, tokens in calls if tokens > 1) <= size
    assert max(rows for rows, tokens in calls if tokens == 1) <= (session.plan.splits.decode_micro_batch or 2 * BATCH)


def _last_layer(session, calls):
    """Notes how many sequences a norm or projection inside of a layer sees."""
    unit = [unit for unit in session._parts.residency.structure.units if unit.role.value == "layer"][-1]
    inside = next(
        module for module in unit.module.modules() if isinstance(module, nn.Linear) or "Conv1D" in type(module).__name__
    )
    return inside.register_forward_hook(lambda module, args, output: calls.append((args[0].shape[0], args[0].shape[1])))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_is_put_together_again(kind):
    from transformers import DynamicCache, StaticCache

    def cache(config):
        return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=MAX_TOKENS)

    model = make("gemma3")
    twin = oracle_of(model)
    plan = edited(plan_of(model, batch_size=BATCH, max_tokens=MAX_TOKENS), "splits", micro_batch=4)
    inputs = padded()
    with (
        torch.inference_mode(),
        offload(
            model, device="cpu", cpu_memory="1GiB", plan=plan, exactness="rounding", batch_size=BATCH, max_tokens=MAX_TOKENS
        ),
    ):
        ours, theirs = cache(model.config), cache(model.config)
        for _ in range(3):
            model(**inputs, past_key_values=ours)
            twin(**inputs, past_key_values=theirs)
            for mine, other in zip(ours.layers, theirs.layers, strict=True):
                assert mine.get_seq_length() == other.get_seq_length()
                torch.testing.assert_close(mine.keys, other.keys, **CLOSE)
                torch.testing.assert_close(mine.values, other.values, **CLOSE)
            inputs = {
                "input_ids": inputs["input_ids"][:, :1],
                "attention_mask": nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
            }


def test_what_is_computed_as_a_whole_is_told_once():
    """As many sequences as tokens: masks of padded prompts do not show their batch then, in any layer."""
    model = make("llama")
    reserve = {"batch_size": 9, "max_tokens": MAX_TOKENS}
    plan = edited(plan_of(model, **reserve), "splits", micro_batch=2)
    inputs = padded(9, 9)
    wanted = oracle_of(model)(**inputs).logits
    with offload(model, device="cpu", cpu_memory="1GiB", plan=plan, exactness="rounding", **reserve) as session:
        for _ in range(2):
            torch.testing.assert_close(model(**inputs).logits, wanted, **CLOSE)
        assert sum("as a whole" in sentence for sentence in session.machine.notes.sentences) == 1


class _Ambiguous(nn.Module):
    def forward(self, hidden_states, other):
        return hidden_states + other.sum()


@pytest.mark.parametrize(
    ("hidden", "other"),
    [((4, 4, 8), (4, 8)), ((3, 5, 8), (3, 3, 5, 8))],
    ids=["as many tokens as sequences", "rows for time, height and width"],
)
def test_what_is_not_sure_is_computed_as_a_whole_and_said(hidden, other):
    module, said = _Ambiguous(), []
    hidden, other = torch.randn(hidden), torch.randn(other)
    wanted = module(hidden, other)
    assert torch.equal(MicroBatches(2, 2, said.append).wrap(module.forward)(hidden, other), wanted)
    assert len(said) == 1 and "as a whole" in said[0]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral"])
def test_micro_batches_hold_less_and_no_more_than_reserved(name):
    model = make(name)
    batch, tokens = 16, 64
    with offload(model, device="cpu", cpu_memory="1GiB", batch_size=batch, max_tokens=tokens) as session:
        spec = session._parts.residency.spec
    held = []
    for size in (2, 4, 8, 16):
        work = DryRun(model, micro_batch=size if size < batch else 0).forward(batch, tokens)
        workload = Workload(batch, tokens, tokens, micro_batch=size if size < batch else 0)
        logits = batch * spec.logits_bytes_per_sequence
        assert work.activation_bytes <= workload.activation_bytes(spec) + logits
        held.append(work.activation_bytes)
    assert held == sorted(held)
    assert held[0] < 0.6 * held[-1]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral"])
def test_chunks_hold_no_more_than_reserved(name):
    model = make(name)
    batch, tokens = 3, 96
    with offload(model, device="cpu", cpu_memory="1GiB", batch_size=batch, max_tokens=tokens) as session:
        spec = session._parts.residency.spec
    held = []
    for size in (12, 24, 48):
        work = DryRun(model).continued(batch, size, tokens - size)
        held.append(work.activation_bytes)
        reserved = Workload(batch, tokens, tokens, prefill_chunk=size).activation_bytes(spec)
        assert work.activation_bytes <= reserved
    assert held[0] < held[-1]


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt2", "mixtral", "phi3", "falcon", "bloom"])
def test_chunks_of_a_prompt_compute_the_same(name, size):
    model = make(name)
    twin = oracle_of(model)
    inputs = padded(3, 18)
    reserve = {"batch_size": 3, "max_tokens": MAX_TOKENS}
    plan = edited(plan_of(model, **reserve), "splits", prefill_chunk=size)
    before = model.generation_config.prefill_chunk_size
    with offload(model, device="cpu", cpu_memory="1GiB", plan=plan, exactness="rounding", **reserve) as session:
        assert_same(answers(model, inputs), answers(twin, inputs))
        report = session.report()
    assert report.prefill.passes == -(-18 // size)
    assert report.prefill.tokens == 3 * 18
    assert report.decode.passes == 5
    assert report.exactness == "rounding"
    assert model.generation_config.prefill_chunk_size == before


def test_a_pass_is_taken_apart_where_nothing_else_fits():
    model = make("llama")
    reserve = {"batch_size": 8, "max_tokens": 128}
    spec = spec_of(model, **reserve)
    budget = budget_for(spec, NONE, 8, 128)
    whole = Workload(8, 128, 128)
    smaller = budget - whole.activation_bytes(spec) // 3
    with offload(model, device="cpu", cpu_memory=smaller, **reserve) as session:
        report = session.report()
        assert session.plan.splits.micro_batch or session.plan.splits.prefill_chunk
        ids = torch.randint(3, VOCAB, (8, 100), generator=torch.Generator().manual_seed(1))
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert output.shape[0] == 8
    assert report.exactness == "rounding"
    assert any("nothing else fits" in sentence for sentence in report.fallbacks)
    with pytest.raises(BudgetTooSmall):
        offload(model, device="cpu", cpu_memory=budget // 8, **reserve).__enter__()


def test_parts_are_halves_and_only_of_what_can_be_taken_apart():
    workload = Workload(16, 512, 256)
    ways = ways_to_split(make("llama"), workload)
    assert [way.micro_batch for way in ways if not way.prefill_chunk] == [8, 4, 2]
    assert [way.prefill_chunk for way in ways if not way.micro_batch] == [128, 64]
    assert ways_to_split(make("t5"), workload) == []
    with pytest.raises(DryRunFailed):
        DryRun(make("bloom"), micro_batch=2).passes(5, 7, 7)
    assert not any(way.micro_batch for way in ways_to_split(make("bloom"), workload))


def test_a_plan_that_rounds_must_be_asked_for():
    model = make("llama")
    plan = plan_of(model)
    for change in ({"micro_batch": 2}, {"prefill_chunk": 64}):
        with pytest.raises(PlanError, match="rounding"):
            offload(model, device="cpu", cpu_memory="1GiB", plan=edited(plan, "splits", **change)).__enter__()


@pytest.mark.parametrize(("name", "change"), [("bloom", "micro_batch"), ("t5", "micro_batch"), ("bert", "prefill_chunk")])
def test_a_plan_that_takes_apart_what_cannot_be_is_refused(name, change):
    model = make(name)
    plan = edited(plan_of(model), "splits", **{change: 2})
    with pytest.raises(PlanError, match=change):
        offload(model, device="cpu", cpu_memory="1GiB", plan=plan, exactness="rounding").__enter__()


def divided_plan(model, percent, **reserve):
    budget = budget_for(spec_of(model, **reserve), NONE, reserve["batch_size"], reserve["max_tokens"]) + 16_384
    with offload(model, gpu_memory=budget, cpu_memory=1 << 26, **reserve) as session:
        plan, spec = session.plan, session._parts.residency.spec
    names = {block.key for block in spec.layers if block.divisible}
    divided = tuple(key for key in plan.weights.in_host_memory if key in names)
    return edited(plan, "weights", cpu_gpu_split=divided, cpu_percent=percent), budget


@pytest.mark.parametrize("held", [True, False], ids=["held model", "checkpoint"])
@pytest.mark.parametrize("name", DIVIDED)
def test_divided_layers_compute_the_same(name, held, tmp_path, monkeypatch):
    monkeypatch.setattr("offload.api.resolve_device", lambda name: DelayedDevice())
    model = make(name)
    twin = oracle_of(model)
    reserve = {"batch_size": 2, "max_tokens": 20}
    plan, budget = divided_plan(model, 40, **reserve)
    assert len(plan.weights.cpu_gpu_split) >= 3
    if not held:
        model.save_pretrained(tmp_path)
    target = model if held else str(tmp_path)
    inputs = BY_NAME[name].inputs()
    with offload(target, gpu_memory=budget, cpu_memory=1 << 26, plan=plan, exactness="rounding", **reserve) as session:
        for _ in range(2):
            torch.testing.assert_close(session.model(**inputs)[0], twin(**inputs)[0], **CLOSE)
        names = dict(session.model.state_dict())
        assert all(torch.equal(value, names[key]) for key, value in twin.state_dict().items())
        block = next(block for block in session._parts.residency.spec.blocks if block.key == plan.weights.cpu_gpu_split[0])
        report = session.report()
    assert report.exactness == "rounding"
    assert report.blocks["cpu_gpu_split"] == len(plan.weights.cpu_gpu_split)
    # The device's rows cross the link and no others.
    moved = sum(span.nbytes for span in session.trace().on("h2d") if span.name == plan.weights.cpu_gpu_split[0])
    assert moved and moved % block.device_part(40).stored_bytes == 0
    assert block.device_part(40).stored_bytes < block.stored_bytes
    if held:
        assert torch.equal(model(**inputs)[0], twin(**inputs)[0])


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_forward_with_gradients_while_copies_arrive(name, monkeypatch):
    """A tensor of one slot is saved for backward while another slot is filled: that is no change of the first one."""
    monkeypatch.setattr("offload.api.resolve_device", lambda name: DelayedDevice())
    pack = OnloadedModule._pack

    def slow(self, tensor):
        # Longer than a copy takes to arrive.
        time.sleep(0.006)
        return pack(self, tensor)

    monkeypatch.setattr(OnloadedModule, "_pack", slow)
    model = make(name)
    twin = oracle_of(model)
    reserve = {"batch_size": 2, "max_tokens": 20}
    budget = budget_for(spec_of(model, **reserve), NONE, 2, 20) + 65_536
    inputs = BY_NAME[name].inputs()
    with offload(model, gpu_memory=budget, cpu_memory=1 << 26, **reserve) as session:
        assert session.plan.weights.streamed
        assert torch.equal(session.model(**inputs)[0], twin(**inputs)[0])
        assert session.machine.device.most_in_flight > 0


def test_an_edited_divided_weight_is_seen(monkeypatch):
    monkeypatch.setattr("offload.api.resolve_device", lambda name: DelayedDevice())
    model = make("llama")
    twin = oracle_of(model)
    reserve = {"batch_size": 2, "max_tokens": 20}
    plan, budget = divided_plan(model, 50, **reserve)
    inputs = BY_NAME["llama"].inputs()
    with offload(model, gpu_memory=budget, cpu_memory=1 << 26, plan=plan, exactness="rounding", **reserve):
        model(**inputs)
        with torch.no_grad():
            for item in (model, twin):
                item.model.layers[2].mlp.up_proj.weight.mul_(1.5)
                item.model.layers[1].self_attn.q_proj.weight.data = item.model.layers[1].self_attn.q_proj.weight.data * 0.5
        torch.testing.assert_close(model(**inputs)[0], twin(**inputs)[0], **CLOSE)
    assert torch.equal(model(**inputs)[0], twin(**inputs)[0])


BROKEN = {
    "no percent": ({"cpu_percent": 0}, "from 1 to 99"),
    "all of it": ({"cpu_percent": 100}, "from 1 to 99"),
    "not streamed from CPU memory": ({"in_host_memory": ()}, "not among the blocks"),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_plan_that_divides_wrongly_is_refused(what, monkeypatch):
    monkeypatch.setattr("offload.api.resolve_device", lambda name: DelayedDevice())
    model = make("llama")
    reserve = {"batch_size": 2, "max_tokens": 20}
    plan, budget = divided_plan(model, 40, **reserve)
    change, sentence = BROKEN[what]
    with pytest.raises(PlanError, match=sentence):
        offload(
            model,
            gpu_memory=budget,
            cpu_memory=1 << 26,
            plan=edited(plan, "weights", **change),
            exactness="rounding",
            **reserve,
        ).__enter__()
