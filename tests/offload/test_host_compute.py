"""Layers that the CPU computes beside a device with memory of its own, and plans that are given."""

import pytest
import torch

from offload import BudgetTooSmall, PlanError, offload
from offload.scheduler.plan import Plan
from tests.architectures import BY_NAME, make, oracle_of, tokens
from tests.budgets import NONE, budget_for, spec_of
from tests.delayed import DelayedDevice
from tests.plans import edited

OPTIONS = {"batch_size": 2, "max_tokens": 20, "cpu_memory": 1 << 26}


@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setattr("offload.api.resolve_device", lambda name: DelayedDevice())


def layers_of(spec):
    return [block.key for block in spec.blocks if ".layers." in block.key or ".h." in block.key or ".block." in block.key]


def plan_with(target, on_host):
    """The rule's plan for no memory to spare, with some streamed layers computed on the CPU instead."""
    budget = budget_for(spec_of(target), NONE, 2, 20) + 16_384
    with offload(target, gpu_memory=budget, **OPTIONS) as session:
        plan = session.plan
    moved = {
        "streamed": tuple(key for key in plan.weights.streamed if key not in on_host),
        "in_host_memory": tuple(key for key in plan.weights.in_host_memory if key not in on_host),
        "computed_on_host": tuple(on_host),
    }
    return edited(plan, "weights", **moved), budget


@pytest.mark.parametrize("held", [True, False], ids=["held model", "checkpoint"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "gemma3", "mixtral"])
def test_layers_on_the_cpu_compute_the_same(name, held, tmp_path):
    """Both devices have this CPU's kernels, so that the results are equal here; on a real one they are rounded."""
    model = make(name)
    twin = oracle_of(model)
    if not held:
        model.save_pretrained(tmp_path)
    target = model if held else str(tmp_path)
    layers = layers_of(spec_of(target))
    plan, budget = plan_with(target, layers[1::2])
    wanted = twin.generate(input_ids=tokens(), max_new_tokens=5, do_sample=False)
    with offload(target, gpu_memory=budget, plan=plan, exactness="rounding", **OPTIONS) as session:
        output = session.model(**BY_NAME[name].inputs())[0]
        assert torch.equal(output, twin(**BY_NAME[name].inputs())[0])
        assert torch.equal(session.model.generate(input_ids=tokens(), max_new_tokens=5, do_sample=False), wanted)
        report = session.report()
        assert report.exactness == "rounding"
        assert report.blocks["computed_on_cpu"] == len(layers[1::2])
        assert set(layers[1::2]) == {span.name for span in session.trace().on("cpu")}
        moved = {span.name for span in session.trace().on("h2d")}
        assert set(plan.weights.streamed) <= moved
        assert moved.isdisjoint(plan.weights.computed_on_host)
    if held:
        assert torch.equal(model(**BY_NAME[name].inputs())[0], twin(**BY_NAME[name].inputs())[0])


def test_a_plan_goes_through_a_file(tmp_path):
    model = make("llama")
    plan, budget = plan_with(model, [])
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    with offload(model, gpu_memory=budget, plan=path, **OPTIONS) as session:
        assert session.plan == plan


BROKEN = {
    "unknown block": (lambda plan: {"streamed": (*plan.weights.streamed, "model.layers.99")}, PlanError, "model.layers.99"),
    "missing block": (lambda plan: {"streamed": plan.weights.streamed[1:]}, PlanError, "does not place"),
    "placed twice": (lambda plan: {"resident": (*plan.weights.resident, plan.weights.streamed[0])}, PlanError, "twice"),
    "no slots": (lambda plan: {"slot_count": 0}, PlanError, "0 slots"),
    "host and not streamed": (
        lambda plan: {"in_host_memory": (plan.weights.row_fetched[0],)},
        PlanError,
        "not among the streamed",
    ),
    "too large": (lambda plan: {"slot_count": 10_000}, BudgetTooSmall, "larger budget"),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_plan_that_does_not_match_is_refused(what):
    model = make("llama")
    change, error, sentence = BROKEN[what]
    plan, budget = plan_with(model, [])
    with pytest.raises(error, match=sentence):
        offload(model, gpu_memory=budget, plan=edited(plan, "weights", **change(plan)), **OPTIONS).__enter__()


def test_computing_on_the_cpu_must_be_asked_for():
    model = make("llama")
    plan, budget = plan_with(model, ["model.layers.1"])
    with pytest.raises(PlanError, match="rounding"):
        offload(model, gpu_memory=budget, plan=plan, **OPTIONS).__enter__()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("{", "not JSON"), ("[]", "JSON object"), ('{"colour": 1}', "colour"), ("{}", "lacks"), (None, "cannot be read")],
)
def test_a_broken_plan_file_is_refused(text, sentence, tmp_path):
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PlanError, match=sentence):
        offload(make("llama"), gpu_memory="1GiB", plan=path, **OPTIONS)


def test_values_in_a_plan_are_checked():
    plan, _ = plan_with(make("llama"), [])
    for old, new in (('"slot_count": 2', '"slot_count": -1'), ('"row_fetched": [', '"row_fetched": [1, ')):
        text = edited(plan, "weights", slot_count=2).to_json()
        assert old in text
        with pytest.raises(PlanError):
            Plan.from_json(text.replace(old, new))
