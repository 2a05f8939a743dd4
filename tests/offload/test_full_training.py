"""The session's own optimizer against the oracle, bit by bit."""

import copy
import json
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from offload import (
    BudgetTooSmall,
    ConfigError,
    CorruptCheckpoint,
    DiskFolderError,
    SessionError,
    Training,
    TrainingError,
    offload,
)
from offload.training.memory import training_memory
from tests import oracle_loop
from tests.architectures import VOCAB, make, oracle_of
from tests.budgets import ALL, NONE, SOME, budget_for, spec_of
from tests.delayed import DelayedDevice

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

BATCH, LENGTH = 2, 12
RESERVE = {"batch_size": BATCH, "max_tokens": LENGTH}
ARCHITECTURES = ["llama", "qwen3", "gemma3", "gpt2", "mixtral", "gpt_neox", "opt"]
SOME_KINDS = ["llama", pytest.param("mixtral", marks=pytest.mark.slow), pytest.param("gpt2", marks=pytest.mark.slow)]
FAST = {"learning_rate": 1e-2, "weight_decay": 0.01}
STEPS = 30


def llama(dtype=torch.float32, **sizes):
    small = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**(small | heads | sizes)))
    for value in model.parameters():
        value.data = value.data.to(dtype).clone()
    return model


def micro_batches(steps, each, length=LENGTH):
    generator = torch.Generator().manual_seed(7)
    found = []
    for step in range(steps):
        group = []
        for k in range(each):
            ids = torch.randint(3, VOCAB, (BATCH, length - (step + k) % 3), generator=generator)
            group.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
        found.append(group)
    return found


def train(session, steps, seed=0, clip=0.5):
    """The user's own loop."""
    model = session.model.train()
    losses = []
    for step, group in enumerate(steps, 1):
        for k, batch in enumerate(group):
            oracle_loop.seed_everything(seed, step, k)
            loss = model(**batch).loss * oracle_loop.share(batch, group)
            loss.backward()
            losses.append(loss.item())
        session.step(max_grad_norm=clip)
    return losses


def prepared(name, tied=False, dtype=torch.float32, router_loss=False):
    model = make(name, tied)
    if router_loss:
        model.config.output_router_logits = True
    for value in model.parameters():
        value.data = value.data.to(dtype)
    return model, oracle_of(model)


def oracle(twin, steps, clip=0.5, **options):
    settings = {"lr": FAST["learning_rate"], "weight_decay": FAST["weight_decay"]}
    return oracle_loop.train(twin, steps, clip=clip, **settings, **options)


def assert_same_weights(ours, theirs):
    wanted = theirs.state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_the_oracle_is_a_naive_loop_where_nothing_is_special():
    _, model = prepared("llama")
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.01, fused=True)
    losses = []
    steps = micro_batches(5, 1)
    twin.train()
    for (batch,) in steps:
        loss = twin(**batch).loss
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert oracle(model, steps) == losses
    assert_same_weights(model, twin)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_weights_in_bf16_with_masters(name, tied):
    model, twin = prepared(name, tied, torch.bfloat16, router_loss=name == "mixtral")
    steps = micro_batches(STEPS, 2)
    budget = budget_for(spec_of(model, **RESERVE), ALL, BATCH, LENGTH) + (16 << 20)
    with offload(model, device="cpu", cpu_memory=budget, training=Training(**FAST), **RESERVE) as session:
        assert session.optimizer.param_groups[0]["lr"] == 1e-2
        losses = train(session, steps)
    assert losses == oracle(twin, steps)
    assert len(set(losses)) > STEPS
    assert_same_weights(model, twin)


def on_a_device(monkeypatch):
    monkeypatch.setattr("offload.api.resolve_device", lambda name: DelayedDevice())


def device_budget(model):
    """Of a device with memory of its own: the least that will do."""
    with offload(model, gpu_memory=1 << 30, cpu_memory=1 << 28, **RESERVE) as session:
        spec = session._parts.residency.spec
    return budget_for(spec, NONE, BATCH, LENGTH) + 32_768


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("state_tier", ["cpu", "nvme"])
def test_two_slots_of_a_device(state_tier, tied, dtype, monkeypatch, tmp_path):
    model, twin = prepared("llama", tied, dtype)
    on_a_device(monkeypatch)
    budget = device_budget(model)
    steps = micro_batches(4, 2)
    training = Training(**FAST, state_tier=state_tier, state_dir=str(tmp_path), sub_group_elements=4096)
    with offload(model, gpu_memory=budget, cpu_memory=1 << 26, training=training, **RESERVE) as session:
        assert session.plan.weights.streamed
        losses = train(session, steps)
    assert losses == oracle(twin, steps)
    assert_same_weights(model, twin)


def nvme_budget(model, folder, training, residency):
    needs = training_memory(model, training, BATCH * LENGTH)
    needed = needs.host_bytes + needs.activation_bytes
    everything = needed + budget_for(spec_of(folder, **RESERVE), ALL, BATCH, LENGTH)
    if residency == ALL:
        return everything + (4 << 20)
    with pytest.raises(BudgetTooSmall) as refused:
        offload(folder, device="cpu", cpu_memory=1, training=training, **RESERVE).__enter__()
    least = refused.value.least_bytes
    return least if residency == NONE else (least + everything) // 2


@pytest.mark.parametrize("residency", [NONE, SOME, ALL])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", SOME_KINDS)
def test_weights_and_states_on_nvme(name, dtype, residency, tmp_path):
    model, twin = prepared(name, name == "gpt2", dtype, router_loss=name == "mixtral")
    checkpoint = tmp_path / "model"
    model.save_pretrained(checkpoint)
    training = Training(full=True, **FAST, state_tier="nvme", state_dir=str(tmp_path), sub_group_elements=4096)
    steps = micro_batches(4, 2)
    if name == "mixtral":
        twin.config.output_router_logits = True
    budget = nvme_budget(model, str(checkpoint), training, residency)
    with offload(str(checkpoint), device="cpu", cpu_memory=budget, training=training, **RESERVE) as session:
        assert bool(session.plan.weights.streamed) == (residency != ALL)
        if name == "mixtral":
            session.model.config.output_router_logits = True
        losses = train(session, steps)
        ours = session.model
        during = {key: value.clone() for key, value in ours.state_dict().items()}
    assert losses == oracle(twin, steps)
    assert_same_weights(ours, twin)
    wanted = twin.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in during.items())
    assert list(tmp_path.glob("states-*")) == []


@pytest.mark.parametrize("residency", [NONE, ALL])
def test_adapters_with_dropout(residency, tmp_path):
    model, twin = prepared("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    steps = micro_batches(STEPS, 2)
    adapters = sum(value.numel() for value in lora(copy.deepcopy(twin)).parameters() if value.requires_grad)
    budget = budget_for(spec_of(str(tmp_path), **RESERVE), residency, BATCH, LENGTH) + 40 * adapters
    with offload(str(tmp_path), device="cpu", cpu_memory=budget, training=Training(**FAST), **RESERVE) as session:
        assert bool(session.plan.weights.streamed) == (residency == NONE)
        adapted = lora(session.model)
        losses = train(session, steps)
        trained = {key: value.clone() for key, value in adapted.state_dict().items() if "lora_" in key}
    adapted_twin = lora(twin)
    assert losses == oracle(adapted_twin, steps)
    wanted = adapted_twin.state_dict()
    assert len(trained) > 10
    for key, value in trained.items():
        assert torch.equal(value, wanted[key]), key


def lora(model):
    torch.manual_seed(3)
    return get_peft_model(
        model, LoraConfig(r=1, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", init_lora_weights=False)
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd(momentum):
    model, twin = prepared("llama")
    steps = micro_batches(5, 1)
    training = Training(optimizer="sgd", learning_rate=0.1, weight_decay=0.01, momentum=momentum)
    with offload(model, device="cpu", cpu_memory="64MiB", training=training, **RESERVE) as session:
        losses = train(session, steps)
    settings = {"lr": 0.1, "weight_decay": 0.01, "momentum": momentum}
    assert losses == oracle_loop.train(twin, steps, clip=0.5, optimizer=torch.optim.SGD, **settings)
    assert_same_weights(model, twin)


def test_a_scheduler_a_users_clipping_and_logging():
    model, twin = prepared("llama")
    steps = micro_batches(6, 1)
    norms, rates = [], []
    with offload(model, device="cpu", cpu_memory="64MiB", training=True, **RESERVE) as session:
        optimizer = session.optimizer
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=4)
        session.model.train()
        for (batch,) in steps:
            session.model(**batch).loss.backward()
            assert all(value.grad.device.type == "cpu" for value in model.parameters())
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            rates.append(scheduler.get_last_lr()[0])
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LinearLR(plain, 0.1, 1.0, total_iters=4)
    twin.train()
    for (batch,), norm, rate in zip(steps, norms, rates, strict=True):
        twin(**batch).loss.backward()
        assert float(torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)) == norm
        plain.step()
        scheduler.step()
        plain.zero_grad()
        assert scheduler.get_last_lr()[0] == rate
    assert_same_weights(model, twin)


def test_what_was_written_between_steps_counts(tmp_path):
    """With masters too: they follow the weight."""
    for tier, dtype in (("nvme", torch.bfloat16), ("cpu", torch.bfloat16), ("nvme", torch.float32)):
        model, _ = prepared("llama", dtype=dtype)
        training = Training(learning_rate=1e-9, state_tier=tier, state_dir=str(tmp_path))
        folder = tmp_path / f"{tier}-{dtype}"
        model.save_pretrained(folder)
        with offload(str(folder), device="cpu", cpu_memory="64MiB", training=training, **RESERVE) as session:
            (batch,), (again,) = micro_batches(2, 1)
            session.model(**batch).loss.backward()
            session.step()
            weight = session.model.model.layers[1].mlp.up_proj.weight
            with torch.no_grad():
                weight.fill_(0.5)
            session.model(**again).loss.backward()
            session.step()
            assert torch.allclose(weight, torch.full_like(weight, 0.5))


def test_what_cannot_be():
    model, _ = prepared("llama")
    (batch,) = micro_batches(1, 1)[0]
    with (
        offload(model, device="cpu", cpu_memory="64MiB", **RESERVE) as session,
        pytest.raises(SessionError, match="training=True"),
    ):
        session.step()
    with offload(model, device="cpu", cpu_memory="64MiB", training=True, **RESERVE) as session:
        session.model(**batch).loss.backward()
        with pytest.raises(SessionError, match="before the first backward"):
            session.step()
        session.model.zero_grad()
        session.model.requires_grad_(False)
        with pytest.raises(SessionError, match="no parameter of the model requires"):
            session.step()
    model.requires_grad_(True)
    with offload(model, device="cpu", cpu_memory="64MiB", training=Training(), **RESERVE) as session:
        session.model(**batch).loss.backward()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.model.norm.weight.grad.fill_(torch.nan)
        with pytest.raises(TrainingError, match="is nan"):
            session.step(1.0)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        session.optimizer.zero_grad()
        session.model(**batch).loss.backward()
        session.step()
        with pytest.raises(SessionError, match="state_dict"):
            session.optimizer.state_dict()
        model.model.norm.weight.requires_grad_(False)
        with pytest.raises(SessionError, match="other parameters"):
            session.step()
    with pytest.raises(BudgetTooSmall, match="gradients"):
        offload(model, device="cpu", cpu_memory="256KiB", training=Training(full=True), **RESERVE).__enter__()


def train_layer_major(session, steps, seed=0, clip=0.5):
    model = session.model.train()
    losses = []
    for step, group in enumerate(steps, 1):

        def loss_of(k, batch, step=step, group=group):
            def compute():
                oracle_loop.seed_everything(seed, step, k)
                return model(**batch).loss * oracle_loop.share(batch, group)

            return compute

        losses += session.backward([loss_of(k, batch) for k, batch in enumerate(group)])
        session.step(max_grad_norm=clip)
    return losses


@pytest.mark.parametrize("residency", [NONE, SOME, ALL])
@pytest.mark.parametrize("name", SOME_KINDS)
def test_layer_major(name, residency, tmp_path):
    model, twin = prepared(name, True, torch.bfloat16, router_loss=name == "mixtral")
    checkpoint = tmp_path / "model"
    model.save_pretrained(checkpoint)
    training = Training(full=True, **FAST, state_tier="nvme", state_dir=str(tmp_path), sub_group_elements=4096)
    steps = micro_batches(4, 4)
    budget = nvme_budget(model, str(checkpoint), training, residency)
    with offload(str(checkpoint), device="cpu", cpu_memory=budget, training=training, **RESERVE) as session:
        session.model.config.output_router_logits = name == "mixtral"
        losses = train_layer_major(session, steps)
        moved = session.report().links["disk"].bytes
        ours = session.model
    assert losses == oracle(twin, steps)
    assert_same_weights(ours, twin)
    if residency == NONE:
        with offload(str(checkpoint), device="cpu", cpu_memory=budget, training=training, **RESERVE) as session:
            train(session, steps)
            assert moved < 0.6 * session.report().links["disk"].bytes


@pytest.mark.parametrize("kind", ["cpu", "nvme", "adapters"])
def test_resumed_as_if_never_stopped(kind, tmp_path):
    model, twin = prepared("llama", True, torch.bfloat16)
    checkpoint = tmp_path / "model"
    model.save_pretrained(checkpoint)
    steps = micro_batches(8, 2)
    states = tmp_path / "states"
    states.mkdir()
    training = Training(**FAST, state_tier="nvme" if kind == "nvme" else "cpu", state_dir=str(states), sub_group_elements=4096)

    def entered():
        return offload(str(checkpoint), device="cpu", cpu_memory="64MiB", training=training, **RESERVE)

    def adapted(model):
        return lora(model) if kind == "adapters" else model

    losses = []
    done = 0
    for until in (3, 4, 8):
        with entered() as session:
            trained = adapted(session.model)
            session.model.train()
            found = session.resume(tmp_path / "run")
            assert (found or {"step": 0})["step"] == done
            for number in range(done, until):
                for k, batch in enumerate(steps[number]):
                    oracle_loop.seed_everything(0, number + 1, k)
                    loss = session.model(**batch).loss * oracle_loop.share(batch, steps[number])
                    loss.backward()
                    losses.append(loss.item())
                session.step(0.5)
                if number != 1:
                    session.save(tmp_path / "run", {"step": number + 1})
        done = until
    twin = adapted(twin)
    assert losses == oracle(twin, steps)
    assert_same_weights(trained, twin)
    assert not list(states.iterdir())
    assert len(list((tmp_path / "run").iterdir())) == 2
    if kind == "cpu":
        refuse_what_does_not_fit(entered, tmp_path)


def refuse_what_does_not_fit(entered, tmp_path):
    manifest = tmp_path / "run" / "training.json"
    other, _ = prepared("llama", True, torch.bfloat16)
    with offload(other, device="cpu", cpu_memory="64MiB", training=Training(), **RESERVE) as session:
        with pytest.raises(ConfigError, match="another model"):
            session.resume(tmp_path / "run")
        assert session.resume(tmp_path / "empty") is None
        with pytest.raises(ConfigError, match="is a file"):
            session.resume(manifest)
    (file,) = (tmp_path / "run").glob("*.bin")
    whole = file.read_bytes()
    for place in (0, len(whole) // 2, len(whole) - 4096 * 3):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        file.write_bytes(flipped)
        with entered() as session, pytest.raises(CorruptCheckpoint, match="checksum"):
            session.resume(tmp_path / "run")
    os.truncate(file, 4096)
    with entered() as session, pytest.raises(CorruptCheckpoint, match="cut short"):
        session.resume(tmp_path / "run")
    said = json.loads(manifest.read_text())
    victim = tmp_path / "offload-checkpoint-0123456789abcdef.bin"
    victim.write_bytes(whole)
    for name in (str(victim), f"../{victim.name}", "training.json"):
        manifest.write_text(json.dumps(said | {"states": name}))
        with entered() as session, pytest.raises(CorruptCheckpoint, match="no manifest"):
            session.resume(tmp_path / "run")
    file.unlink()
    file.symlink_to(victim)
    manifest.write_text(json.dumps(said))
    with entered() as session, pytest.raises(DiskFolderError, match="cannot be read"):
        session.resume(tmp_path / "run")
    manifest.write_text("{")
    with entered() as session, pytest.raises(CorruptCheckpoint, match="no manifest"):
        session.resume(tmp_path / "run")
    assert victim.read_bytes() == whole


@pytest.mark.parametrize("major", ["batch", "layer"])
@pytest.mark.parametrize("tier", ["recompute", "gpu", "cpu", "nvme"])
@pytest.mark.parametrize("name", SOME_KINDS)
def test_where_layers_inputs_wait(name, tier, major, monkeypatch, tmp_path):
    model, twin = prepared(name, True, torch.bfloat16, router_loss=name == "mixtral")
    on_a_device(monkeypatch)
    monkeypatch.setattr("offload.training.backward.activation_offload._LEAST_BYTES", 64)
    budget = device_budget(model) + (1 << 20)
    steps = micro_batches(3, 3)
    training = Training(**FAST, activation_tier=tier, state_dir=str(tmp_path), sub_group_elements=4096)
    with offload(model, gpu_memory=budget, cpu_memory=1 << 26, training=training, **RESERVE) as session:
        assert not session.plan.weights.streamed
    budget = device_budget(model) + 131_072
    training = Training(full=True, **FAST, activation_tier=tier, state_dir=str(tmp_path), sub_group_elements=4096)
    with offload(model, gpu_memory=budget, cpu_memory=1 << 26, training=training, **RESERVE) as session:
        assert session.plan.weights.streamed
        losses = (train if major == "batch" else train_layer_major)(session, steps)
        written = session.machine.host.writes.bytes_moved
    assert losses == oracle(twin, steps)
    assert_same_weights(model, twin)
    assert bool(written) == (tier == "nvme")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tier", ["recompute", "gpu", "cpu", "nvme"])
@pytest.mark.parametrize("residency", [NONE, ALL])
def test_adapters_and_where_inputs_wait(tier, residency, monkeypatch, tmp_path):
    model, twin = prepared("qwen3", False, torch.float32)
    checkpoint = tmp_path / "model"
    model.save_pretrained(checkpoint)
    states = tmp_path / "states"
    states.mkdir()
    monkeypatch.setattr("offload.training.backward.activation_offload._LEAST_BYTES", 64)
    budget = budget_for(spec_of(str(checkpoint), **RESERVE), residency, BATCH, LENGTH)
    with offload(
        str(checkpoint), device="cpu", cpu_memory="64MiB", training=Training(activation_tier=tier), **RESERVE
    ) as session:
        # What adapters, their optimizer and layer inputs take comes on top.
        budget += (1 << 16) + session._parts.prepared.memory.activation_bytes
    steps = micro_batches(6, 2)
    training = Training(**FAST, activation_tier=tier, state_dir=str(states))
    with offload(str(checkpoint), device="cpu", cpu_memory=budget, training=training, **RESERVE) as session:
        adapted = lora(session.model)
        losses = train_layer_major(session, steps)
        trained = {key: value.clone() for key, value in adapted.state_dict().items() if "lora_" in key}
        said = any("activation_tier" in sentence for sentence in session.report().fallbacks)
    adapted_twin = lora(twin)
    assert losses == oracle(adapted_twin, steps)
    wanted = adapted_twin.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in trained.items())
    assert said == (tier == "cpu")
    assert not list(states.iterdir())


@pytest.mark.parametrize("major", ["batch", "layer"])
@pytest.mark.parametrize("residency", [NONE, SOME, ALL])
@pytest.mark.parametrize("name", SOME_KINDS)
def test_updates_while_the_next_forward_runs(name, residency, major, monkeypatch, tmp_path):
    model, twin = prepared(name, True, torch.bfloat16, router_loss=name == "mixtral")
    checkpoint = tmp_path / "model"
    model.save_pretrained(checkpoint)
    states = tmp_path / "states"
    states.mkdir()
    training = Training(full=True, **FAST, state_tier="nvme", state_dir=str(states), sub_group_elements=4096)
    steps = micro_batches(6, 2)
    budget = nvme_budget(model, str(checkpoint), training, residency)
    late = []
    with offload(str(checkpoint), device="cpu", cpu_memory=budget, training=training, **RESERVE) as session:
        session.model.config.output_router_logits = name == "mixtral"
        step = session.step

        def overlapped(max_grad_norm):
            norm = step(max_grad_norm, overlap=True)
            late.append(len(session._parts.components["training"].streamed_training._late))
            if len(late) == 4:
                session.save(tmp_path / "run", {})
                assert not session._parts.components["training"].streamed_training._late
            return norm

        session.step = overlapped
        losses = (train if major == "batch" else train_layer_major)(session, steps)
        session.finish()
        ours = {key: value.clone() for key, value in session.model.state_dict().items()}
    assert min(late) >= 4
    assert losses == oracle(twin, steps)
    wanted = twin.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in ours.items())


def test_an_overlapped_step_on_a_device(monkeypatch, tmp_path):
    model, twin = prepared("llama", True, torch.bfloat16)
    on_a_device(monkeypatch)
    budget = device_budget(model) + 65_536
    steps = micro_batches(6, 2)
    training = Training(full=True, **FAST, state_tier="nvme", state_dir=str(tmp_path), sub_group_elements=4096)
    with offload(model, gpu_memory=budget, cpu_memory=1 << 26, training=training, **RESERVE) as session:
        step = session.step
        session.step = lambda max_grad_norm: step(max_grad_norm, overlap=True)
        losses = train(session, steps)
    # Leaving finishes what was begun.
    assert losses == oracle(twin, steps)
    assert_same_weights(model, twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_loss_in_chunks_is_nearly_the_same(name, tied, dtype):
    """Relative errors of loss and gradients; docs/training.md says how large."""
    model, twin = prepared(name, tied, dtype)
    (batch,) = micro_batches(1, 1)[0]
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, :5] = -100
    training = Training(loss_chunk=5, master_dtype="none")
    with offload(model, device="cpu", cpu_memory="64MiB", training=training, **RESERVE) as session:
        output = session.model(**batch)
        assert output.logits is None
        output.loss.backward()
        assert session.model(batch["input_ids"]).logits.shape[-1] == VOCAB
        assert session.report().exactness == "rounding"
        ours = [value.grad.clone() for value in model.parameters()]
    wanted = twin(**batch)
    wanted.loss.backward()
    assert output.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-6 if dtype == torch.float32 else 1e-2)
    theirs = torch.cat([value.grad.float().view(-1) for value in twin.parameters()])
    error = (torch.cat([value.float().view(-1) for value in ours]) - theirs).norm() / theirs.norm()
    assert error < (1e-6 if dtype == torch.float32 else 2e-2)
    assert model(**batch).logits is not None


def test_a_loss_in_chunks_of_streamed_layers(tmp_path):
    model = llama(vocab_size=4096, num_hidden_layers=12)
    twin = oracle_of(model)
    checkpoint = tmp_path / "model"
    model.save_pretrained(checkpoint)
    budget = budget_for(spec_of(str(checkpoint), **RESERVE), NONE, BATCH, LENGTH) + 200_000
    training = Training(loss_chunk=7, activation_tier="nvme", state_dir=str(tmp_path))
    (batch,) = micro_batches(1, 1)[0]
    with offload(str(checkpoint), device="cpu", cpu_memory=budget, training=training, **RESERVE) as session:
        assert session.plan.weights.streamed
        session.model.requires_grad_(False)
        session.model.model.layers[0].mlp.up_proj.weight.requires_grad_()
        session.model(**batch, use_cache=False).loss.backward()
        ours = session.model.model.layers[0].mlp.up_proj.weight.grad.clone()
    twin(**batch).loss.backward()
    wanted = twin.model.layers[0].mlp.up_proj.weight.grad
    assert (ours - wanted).norm() <= 1e-5 * wanted.norm()


def test_what_cannot_have_its_loss_in_chunks():
    (batch,) = micro_batches(1, 1)[0]
    training = Training(loss_chunk=4)
    for name in ("gemma2", "t5"):
        with offload(make(name), device="cpu", cpu_memory="64MiB", training=training, **RESERVE) as session:
            inputs = batch if name == "gemma2" else batch | {"decoder_input_ids": batch["input_ids"], "use_cache": False}
            with pytest.raises(SessionError, match="changes its logits"):
                session.model(**inputs)
    with pytest.raises(ConfigError, match="loss_chunk=4 needs"):
        offload(make("bert"), device="cpu", cpu_memory="64MiB", training=training, **RESERVE).__enter__()


@pytest.mark.parametrize("device", [True, False], ids=["a device", "the CPU"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_loss_in_chunks_of_several_micro_batches(tied, device, monkeypatch, tmp_path):
    """In either order: micro-batches that go through the model layer by layer share its loss function."""
    found = []
    for major in ("batch", "layer"):
        for chunk in (0, 5):
            with monkeypatch.context() as patch:
                model, _ = prepared("llama", tied, torch.float32)
                model.save_pretrained(tmp_path / "model")
                training = Training(full=True, **FAST, loss_chunk=chunk, state_tier="nvme", state_dir=str(tmp_path))
                budget = {"device": "cpu", "cpu_memory": nvme_budget(model, str(tmp_path / "model"), training, NONE)}
                if device:
                    on_a_device(patch)
                    budget = {"gpu_memory": device_budget(model), "cpu_memory": 1 << 26}
                with offload(str(tmp_path / "model"), training=training, **budget, **RESERVE) as session:
                    assert session.plan.weights.streamed
                    found.append((train if major == "batch" else train_layer_major)(session, micro_batches(3, 3)))
    assert found[0] == found[2]
    assert found[1] == found[3]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("tier", ["cpu", "nvme"])
def test_moments_in_eight_bits(tier, tmp_path):
    """Learn nearly as well, in a quarter of the memory."""
    steps = [micro_batches(1, 1)[0]] * 40
    losses, held = {}, {}
    for optimizer in ("adamw", "adamw8bit"):
        model, _ = prepared("llama", dtype=torch.bfloat16)
        training = Training(optimizer=optimizer, learning_rate=3e-3, state_tier=tier, state_dir=str(tmp_path))
        torch.manual_seed(0)
        with offload(model, device="cpu", cpu_memory="64MiB", training=training, **RESERVE) as session:
            losses[optimizer] = train(session, steps, clip=1.0)
            held[optimizer] = session._parts.components["training"].streamed_training.layout.state_bytes
    assert losses["adamw"][-1] < 0.5 * losses["adamw"][0]
    assert losses["adamw8bit"][-1] == pytest.approx(losses["adamw"][-1], rel=0.25)
    assert held["adamw8bit"] < 0.6 * held["adamw"]


def test_an_update_that_fails_half_way_is_not_gone_on_from(monkeypatch, tmp_path):
    model, _ = prepared("llama", dtype=torch.bfloat16)
    steps = micro_batches(2, 1)
    training = Training(**FAST, state_tier="nvme", state_dir=str(tmp_path), sub_group_elements=4096)
    with offload(model, device="cpu", cpu_memory="64MiB", training=training, **RESERVE) as session:
        train(session, steps)
        session.model(**steps[0][0]).loss.backward()
        real, calls = session._parts.components["training"].streamed_training._rule.step, []

        def failing(*args):
            calls.append(1)
            if len(calls) == 3:
                raise OSError("the disk is gone")
            real(*args)

        monkeypatch.setattr(session._parts.components["training"].streamed_training._rule, "step", failing)
        with pytest.raises(OSError, match="the disk is gone"):
            session.step()
        for use in (session.step, session.finish, lambda: session.model(**steps[0][0])):
            with pytest.raises(SessionError, match="failed half way"):
                use()


def state_bytes_a_parameter(dtype):
    """A model whose tensors are large enough for what aligning them adds to be nothing."""
    model = llama(dtype, vocab_size=4096, hidden_size=512, intermediate_size=1024)
    with offload(model, device="cpu", cpu_memory="512MiB", training=Training(full=True), **RESERVE) as session:
        _ = session.optimizer
        session.model(**micro_batches(1, 1)[0][0]).loss.backward()
        held = session.report().tiers["cpu"].at_peak_bytes
        counted = sum(held[name] for name in ("resident weights", "gradients", "optimizer state"))
        return counted / sum(value.numel() for value in model.parameters())


def test_host_memory_a_parameter():
    """bf16: weight 2, master 4, moments 8, gradient 4; fp32: weight 4, moments 8, gradient 4."""
    assert 18 <= state_bytes_a_parameter(torch.bfloat16) < 18.02
    assert 16 <= state_bytes_a_parameter(torch.float32) < 16.02


def test_device_memory_follows_the_largest_block_not_the_model(monkeypatch, tmp_path):
    on_a_device(monkeypatch)
    peaks = []
    for layers in (4, 12):
        model = llama(num_hidden_layers=layers)
        training = Training(full=True, state_tier="nvme", activation_tier="nvme", state_dir=str(tmp_path))
        budget = device_budget(model)
        with offload(model, gpu_memory=budget, cpu_memory=1 << 26, training=training, **RESERVE) as session:
            train(session, micro_batches(2, 1))
            peaks.append(session.report().tiers["gpu"].peak_bytes)
    # Norms stay: three times as many are a little more.
    assert peaks[1] < 1.3 * peaks[0]


LONG = [
    # architecture, activation tier, state tier, order of micro-batches, how much of it stays
    ("llama", "recompute", "cpu", "batch", "a device's two slots"),
    ("qwen3", "gpu", "nvme", "layer", "a device's two slots"),
    ("gemma3", "cpu", "cpu", "layer", "a device's two slots"),
    ("mixtral", "nvme", "nvme", "layer", "a device's two slots"),
    ("mixtral", "gpu", "cpu", "batch", "a device's two slots"),
    ("gpt2", "nvme", "nvme", "batch", NONE),
    ("gpt_neox", "recompute", "nvme", "layer", NONE),
    ("llama", "cpu", "nvme", "batch", SOME),
    ("opt", "gpu", "nvme", "layer", ALL),
    ("qwen3", "nvme", "cpu", "batch", ALL),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "activations", "states", "major", "stays"), LONG, ids=["-".join(item[:4]) for item in LONG])
def test_thirty_steps(name, activations, states, major, stays, monkeypatch, tmp_path):
    """Tied, clipped, accumulated, in bf16 with masters, an auxiliary loss where there is one; every tier, order and residency."""
    model, twin = prepared(name, True, torch.bfloat16, router_loss=name == "mixtral")
    monkeypatch.setattr("offload.training.backward.activation_offload._LEAST_BYTES", 64)
    checkpoint, folder = tmp_path / "model", tmp_path / "states"
    model.save_pretrained(checkpoint)
    folder.mkdir()
    training = Training(
        full=True,
        **FAST,
        activation_tier=activations,
        state_tier=states,
        state_dir=str(folder),
        sub_group_elements=4096,
        micro_batches=2,
    )
    target, budget = str(checkpoint), {"device": "cpu"}
    if stays == "a device's two slots":
        on_a_device(monkeypatch)
        target, budget = model, {"gpu_memory": device_budget(model) + (1 << 20), "cpu_memory": 1 << 26}
    elif states == "nvme":
        budget["cpu_memory"] = nvme_budget(model, target, training, stays)
    else:
        budget["cpu_memory"] = "64MiB"
    steps = micro_batches(STEPS, 2)
    with offload(target, training=training, **budget, **RESERVE) as session:
        assert bool(session.plan.weights.streamed) == (stays != ALL)
        session.model.config.output_router_logits = name == "mixtral"
        losses = (train if major == "batch" else train_layer_major)(session, steps)
        ours = {key: value.clone() for key, value in session.model.state_dict().items()}
    assert losses == oracle(twin, steps)
    wanted = twin.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in ours.items())


@pytest.mark.parametrize("tier", ["cpu", "nvme"])
def test_too_little_for_training_proposes_what_is_not_asked_for_already(tier, tmp_path):
    training = Training(full=True, state_tier=tier, state_dir=str(tmp_path))
    with pytest.raises(BudgetTooSmall, match="training holds") as refused:
        offload(make("llama"), device="cpu", cpu_memory="60KiB", training=training, **RESERVE).__enter__()
    assert ("state_tier='nvme'" in str(refused.value)) == (tier == "cpu")
