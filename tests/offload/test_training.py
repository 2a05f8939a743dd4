"""Training inside the context: losses, gradients and weights of the plain model, bit by bit."""

import platform
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model

from offload import BudgetTooSmall, ConfigError, SessionError, Training, offload
from offload.scheduler.model_spec import Workload
from tests.architectures import VOCAB, make, oracle_of
from tests.budgets import ALL, NONE, SOME, budget_for, spec_of, training_budget_for
from tests.delayed import DelayedDevice
from tests.poison import poison_homes

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

BATCH, LENGTH = 2, 12
RESERVE = {"batch_size": BATCH, "max_tokens": LENGTH}
TRAINED = ["llama", "qwen3", "gemma3", "gpt2", "mixtral", "gpt_neox", "opt"]


def batches(count):
    for step in range(count):
        generator = torch.Generator().manual_seed(100 + step)
        ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def train(model, steps=4, clip=0.5, micro_batches=2, **options):
    """A plain loop; returns the losses."""
    model.train()
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, **options)
    losses = []
    for step, batch in enumerate(batches(steps * micro_batches)):
        torch.manual_seed(step)
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        if (step + 1) % micro_batches == 0:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            optimizer.zero_grad()
    return losses


def assert_trained_alike(ours, theirs):
    wanted = dict(theirs.named_parameters())
    for name, value in ours.named_parameters():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("where", ["cpu", "device", "checkpoint"])
def test_what_an_optimizer_writes_without_a_trace_is_seen(where, monkeypatch, tmp_path):
    """Fused optimizers do not bump the version of what they write."""
    model = make("llama")
    twin = oracle_of(model)
    target = model
    if where == "checkpoint":
        model.save_pretrained(tmp_path)
        target = str(tmp_path)
    options = {"device": "cpu", "cpu_memory": training_budget_for(spec_of(target, **RESERVE), NONE, BATCH, LENGTH)}
    if where == "device":
        options = {"gpu_memory": options["cpu_memory"] + 16_384, "cpu_memory": 1 << 26}
        monkeypatch.setattr("offload.api.resolve_device", lambda name: DelayedDevice())
    with offload(target, training=True, **options, **RESERVE) as session:
        assert session.plan.weights.streamed
        losses = train(session.model, fused=True)
        trained = session.model
    assert losses == train(twin, fused=True)
    assert_trained_alike(trained, twin)


def test_a_table_alone_is_trained_alike(tmp_path):
    """Everything but the embedding stays: its rows come from the file, until they are trained."""
    model = make("llama")
    twin = oracle_of(model)
    model.save_pretrained(tmp_path)
    spec = spec_of(str(tmp_path), **RESERVE)
    budget = budget_for(spec, ALL, BATCH, LENGTH) - 4096
    with offload(str(tmp_path), device="cpu", cpu_memory=budget, training=True, **RESERVE) as session:
        assert session.plan.weights.row_fetched == ("model.embed_tokens",)
        plan = session.plan
        losses = train(session.model, fused=True)
        trained = session.model
    assert losses == train(twin, fused=True), plan
    assert_trained_alike(trained, twin)


def lora(model):
    torch.manual_seed(3)
    return get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", init_lora_weights=False)
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("residency", [NONE, SOME, ALL])
@pytest.mark.parametrize("name", TRAINED)
def test_all_weights_are_trained_alike(name, residency, tied):
    model = make(name, tied)
    twin = oracle_of(model)
    budget = training_budget_for(spec_of(model, **RESERVE), residency, BATCH, LENGTH)
    with offload(model, device="cpu", cpu_memory=budget, training=True, **RESERVE) as session:
        losses = train(session.model)
        report = session.report()
    assert losses == train(twin)
    assert losses[-1] != losses[0]
    assert_trained_alike(model, twin)
    assert report.backward.passes == 8


@pytest.mark.parametrize("residency", [NONE, SOME])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_neox", "phi3"])
def test_adapters_are_trained_alike(name, residency, tmp_path):
    model = make(name)
    twin = oracle_of(model)
    model.save_pretrained(tmp_path)
    budget = training_budget_for(spec_of(str(tmp_path), **RESERVE), residency, BATCH, LENGTH) + (1 << 20)
    expected = train(lora(twin))
    with offload(str(tmp_path), device="cpu", cpu_memory=budget, training=True, **RESERVE) as session:
        adapted = lora(session.model)
        assert train(adapted) == expected
        trained = {key: value.clone() for key, value in adapted.state_dict().items() if "lora_" in key}
    wanted = twin.state_dict()
    assert len(trained) > 10
    for key, value in trained.items():
        assert torch.equal(value, wanted[key.removeprefix("base_model.model.")]), key


@pytest.mark.parametrize("residency", [NONE, SOME])
def test_weights_are_brought_for_each_direction_and_homes_are_not_computed_with(residency, tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path)
    twin = oracle_of(model)
    budget = training_budget_for(spec_of(str(tmp_path), **RESERVE), residency, BATCH, LENGTH)
    batch = next(batches(1))
    with offload(str(tmp_path), device="cpu", cpu_memory=budget, training=True, **RESERVE) as session:
        ours = session.model.requires_grad_(False)
        embedded = twin.model.embed_tokens(batch["input_ids"]).detach()
        poison_homes(session)
        inputs = {"inputs_embeds": embedded.clone().requires_grad_(), "labels": batch["labels"]}
        loss = ours(**inputs).loss
        loss.backward()
        session.machine.host.reads.wait_idle()
        moved = session.report().links["disk"].bytes
        layers = [block for block in session._parts.residency.spec.layers if block.key in session.plan.weights.streamed]
    wanted = {"inputs_embeds": embedded.clone().requires_grad_(), "labels": batch["labels"]}
    twin.requires_grad_(False)(**wanted).loss.backward()
    assert torch.equal(inputs["inputs_embeds"].grad, wanted["inputs_embeds"].grad)
    # Twice, but for those that were still in their slots when backward began.
    assert moved >= (2 * len(layers) - 3) * layers[0].stored_bytes


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_late_copies_are_waited_for(name, monkeypatch):
    monkeypatch.setattr("offload.api.resolve_device", lambda name: DelayedDevice())
    model = make(name)
    twin = oracle_of(model)
    budget = budget_for(spec_of_device(model), NONE, BATCH, LENGTH) + 16_384
    with offload(model, gpu_memory=budget, cpu_memory=1 << 26, training=True, **RESERVE) as session:
        assert session.plan.weights.in_host_memory
        losses = train(session.model, steps=2)
    assert losses == train(twin, steps=2)
    assert_trained_alike(model, twin)


def spec_of_device(model):
    with offload(model, gpu_memory=1 << 30, cpu_memory=1 << 26, **RESERVE) as session:
        return session._parts.residency.spec


def test_what_was_changed_before_backward_is_refused_and_training_goes_on():
    model = make("llama")
    twin = oracle_of(model)
    budget = training_budget_for(spec_of(model, **RESERVE), NONE, BATCH, LENGTH)
    batch = next(batches(1))
    with offload(model, device="cpu", cpu_memory=budget, training=True, **RESERVE) as session:
        loss = session.model(**batch).loss
        with torch.no_grad():
            session.model.model.layers[1].mlp.up_proj.weight.mul_(1.0)
        with pytest.raises(SessionError, match="between forward and backward"):
            loss.backward()
        session.model.zero_grad()
        losses = train(session.model)
    assert losses == train(twin)
    assert_trained_alike(model, twin)


def test_an_input_that_was_written_to_is_refused():
    model = make("llama").requires_grad_(False)
    budget = training_budget_for(spec_of(model, **RESERVE), NONE, BATCH, LENGTH)
    embedded = torch.randn(BATCH, LENGTH, 32)
    with offload(model, device="cpu", cpu_memory=budget, training=True, **RESERVE) as session:
        session.model.model.norm.weight.requires_grad_()
        given = []
        handle = session.model.model.layers[2].register_forward_pre_hook(lambda module, args: given.append(args[0]))
        session.model.model.layers[0].mlp.up_proj.weight.requires_grad_()
        loss = session.model(inputs_embeds=embedded, labels=next(batches(1))["labels"]).loss
        handle.remove()
        with torch.no_grad():
            given[0].mul_(2)
        with pytest.raises(SessionError, match="was changed between forward and backward"):
            loss.backward()


def test_backward_twice_through_one_graph():
    model = make("qwen3")
    twin = oracle_of(model)
    budget = training_budget_for(spec_of(model, **RESERVE), NONE, BATCH, LENGTH)
    batch = next(batches(1))
    for item, context in (
        (model, offload(model, device="cpu", cpu_memory=budget, training=True, **RESERVE)),
        (twin, nullcontext()),
    ):
        with context:
            loss = item(**batch).loss
            loss.backward(retain_graph=True)
            loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_router_logits_keep_their_gradient():
    model = make("mixtral")
    model.config.output_router_logits = True
    twin = oracle_of(model)
    budget = training_budget_for(spec_of(model, **RESERVE), NONE, BATCH, LENGTH)
    with offload(model, device="cpu", cpu_memory=budget, training=True, **RESERVE) as session:
        losses = train(session.model)
    assert losses == train(twin)
    assert_trained_alike(model, twin)


def test_checkpointing_may_be_on():
    model = make("llama")
    twin = oracle_of(model)
    budget = training_budget_for(spec_of(model, **RESERVE), NONE, BATCH, LENGTH)
    with offload(model, device="cpu", cpu_memory=budget, training=True, **RESERVE) as session:
        session.model.gradient_checkpointing_enable({"use_reentrant": False})
        losses = train(session.model)
        session.model.gradient_checkpointing_disable()
    assert losses == train(twin)
    assert_trained_alike(model, twin)


def test_in_bf16_with_autocast():
    model = make("llama")
    twin = oracle_of(model)
    budget = training_budget_for(spec_of(model, **RESERVE), NONE, BATCH, LENGTH)
    with torch.autocast("cpu", torch.bfloat16):
        with offload(model, device="cpu", cpu_memory=budget, training=True, **RESERVE) as session:
            losses = train(session.model)
        assert losses == train(twin)
    assert_trained_alike(model, twin)


@pytest.mark.filterwarnings("ignore:the model computes on:UserWarning")
def test_a_trainer_trains_the_same(tmp_path):
    from transformers import Trainer, TrainingArguments

    def trained(model):
        settings = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "seed": 1}
        quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
        data = [{"input_ids": ids, "labels": ids} for batch in batches(8) for ids in batch["input_ids"]]
        trainer = Trainer(model=model, args=TrainingArguments(str(tmp_path), **settings, **quiet), train_dataset=data)
        trainer.train()
        return [item["loss"] for item in trainer.state.log_history if "loss" in item]

    model = make("llama")
    twin = oracle_of(model)
    budget = training_budget_for(spec_of(model, **RESERVE), NONE, BATCH, LENGTH)
    with offload(model, device="cpu", cpu_memory=budget, training=True, **RESERVE) as session:
        losses = trained(session.model)
    assert losses == trained(twin)
    assert_trained_alike(model, twin)


def test_training_is_exact_or_refused():
    model = make("llama")
    with pytest.raises(ConfigError, match="training=True is exact"):
        offload(model, device="cpu", training=True, exactness="rounding")
    reserve = {"batch_size": 8, "max_tokens": 128}
    spec = spec_of(model, **reserve)
    budget = training_budget_for(spec, NONE, 8, 128) - Workload(8, 128, 128).activation_bytes(spec) // 3
    with pytest.raises(BudgetTooSmall):
        offload(model, device="cpu", cpu_memory=budget, training=True, **reserve).__enter__()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="it is about x86")
@pytest.mark.parametrize(("capability", "dtype"), [("AVX2", "bfloat16"), ("AVX512", "bfloat16"), ("AVX2", "float32")])
def test_a_processor_without_instructions_for_half_precision_is_told(capability, dtype, monkeypatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    model = make("llama").to(getattr(torch, dtype))
    with offload(model, device="cpu", cpu_memory="64MiB", training=Training(), batch_size=2, max_tokens=16) as session:
        said = any("many times as long" in sentence for sentence in session.report().fallbacks)
    assert said == (capability == "AVX2" and dtype == "bfloat16")
