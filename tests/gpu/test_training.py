"""Full fine-tuning on a real card: copies out, gradients on their way to CPU memory, layer inputs on each tier."""

import contextlib
import re
import warnings

import pytest
import torch

from offload import BudgetExceeded, BudgetTooSmall, Training, offload
from offload.storage.devices.resolve import resolve_device
from tests import oracle_loop
from tests.architectures import make, oracle_of, tokens
from tests.budgets import NONE, budget_for, spec_of
from tests.gpu.test_overlap import model
from tests.gpu.timed import LINK, seconds_of, speeds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

BATCH, LENGTH = 2, 9
RESERVE = {"batch_size": BATCH, "max_tokens": LENGTH}


def in_bf16(model):
    for value in model.parameters():
        value.data = value.data.to(torch.bfloat16)
    return model


def steps(device="cpu"):
    ids = tokens(BATCH, LENGTH).to(device)
    return [[{"input_ids": each, "labels": each} for each in (ids, ids.roll(1, 1))] for _ in range(4)]


def trained(layer_major, **options):
    """Losses, and weights after."""
    model = in_bf16(make("llama", tied=True))
    budget = budget_for(spec_of(model, **RESERVE), NONE, BATCH, LENGTH, "cuda") + (1 << 20)
    training = Training(full=True, learning_rate=1e-2, sub_group_elements=4096, **options)
    losses = []
    with (
        warnings.catch_warnings(),
        offload(model, device="cuda", gpu_memory=budget, cpu_memory="1GiB", training=training, **RESERVE) as session,
    ):
        warnings.simplefilter("ignore")
        session.model.train()
        for group in steps():
            found = session.backward([lambda batch=batch: session.model(**batch).loss / 2 for batch in group], layer_major)
            assert all(value.grad.device.type == "cpu" for value in model.parameters() if value.grad is not None)
            session.step(1.0, overlap=True)
            losses += found
        session.finish()
        assert session.plan.weights.streamed
    return losses, {name: value.clone() for name, value in model.state_dict().items()}


def same(ours, theirs):
    assert ours[0] == theirs[0]
    assert all(torch.equal(value, theirs[1][name]) for name, value in ours[1].items())


def test_every_tier_and_order_gives_the_same_bits(tmp_path):
    wanted = trained(False)
    assert len(set(wanted[0])) > 4
    same(trained(True), wanted)
    for tier in ("gpu", "cpu", "nvme"):
        same(trained(True, activation_tier=tier, state_dir=str(tmp_path)), wanted)
    same(trained(False, state_tier="nvme", state_dir=str(tmp_path)), wanted)


def test_close_to_the_oracle_whose_optimizer_is_on_the_card():
    """The first losses are equal; then AdamW's kernels differ in their last bits."""
    twin = in_bf16(oracle_of(make("llama", tied=True))).to("cuda")
    wanted = oracle_loop.train(twin, steps("cuda"), clip=1.0, lr=1e-2, weight_decay=0.0)
    losses, _ = trained(False)
    assert losses[:2] == wanted[:2]
    assert losses == pytest.approx(wanted, rel=2e-2)


@pytest.mark.parametrize("layer_major", [True, False])
def test_a_loss_in_chunks_of_several_micro_batches(layer_major):
    wanted = trained(layer_major)
    losses, weights = trained(layer_major, loss_chunk=5)
    assert losses == pytest.approx(wanted[0], rel=2e-2)
    for name, value in weights.items():
        torch.testing.assert_close(value.float(), wanted[1][name].float(), rtol=0.1, atol=0.02)


class Forces(torch.nn.Module):
    """A model whose forward differentiates, as force fields do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        width = torch.nn.Linear, torch.nn.Tanh
        self.layers = torch.nn.ModuleList(
            [torch.nn.Sequential(width[0](16, 64), width[1](), width[0](64, 16)) for _ in range(6)]
        )

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = x
            for layer in self.layers:
                energy = energy + layer(energy)
            return torch.autograd.grad(energy.sum(), x)[0]


def test_a_forward_that_differentiates():
    model, twin = Forces().requires_grad_(False), Forces().requires_grad_(False).to("cuda")
    budget = sum(value.nbytes for value in model.parameters()) // 2 + 65_536 + resolve_device("cuda").workspace_bytes
    inputs = torch.randn(2, 16, device="cuda")
    with offload(model, training=True, device="cuda", gpu_memory=budget, cpu_memory="100MiB") as session:
        assert session.plan.weights.streamed
        for _ in range(3):
            assert torch.equal(session.model(inputs), twin(inputs))


@pytest.mark.parametrize("kind", ["foreach", "fused"])
def test_weights_that_ones_own_optimizer_writes_cross_the_link_once_a_pass(kind, card):
    """What a load brings is what was written; only what was loaded ahead of the writing comes twice."""
    plain = model(16).train()
    twin, ids = oracle_of(plain), tokens(1, 32)
    made = {"lr": 1e-2, "momentum": 0.9, kind: True}
    spec = spec_of(plain, batch_size=1, max_tokens=32)
    budget = budget_for(spec, NONE, 1, 32, "cuda") + 3 * max(block.slot_bytes for block in spec.blocks)

    def steps_of(trained, given):
        optimizer = torch.optim.SGD(trained.parameters(), **made)

        def step():
            loss = trained(input_ids=given, labels=given, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())

        losses: list[float] = []
        return step, losses

    step, wanted = steps_of(twin, ids)
    for _ in range(5):
        step()
    options = {"gpu_memory": budget, "cpu_memory": "1GiB", "batch_size": 1, "max_tokens": 32}
    with offload(plain, device="cuda", training=True, **options) as session:
        weights = session.plan.weights
        streamed_bytes = weights.streamed_bytes
        step, found = steps_of(session.model, ids.cuda())
        step(), step()
        with speeds(card, 100 * LINK):
            _, busy = seconds_of(card, step, 3)
    assert found == pytest.approx(wanted, rel=1e-4)
    copied_bytes = busy["h2d"] * LINK / 3
    ahead = weights.slot_count * weights.slot_bytes
    assert copied_bytes <= 2 * streamed_bytes + 2 * ahead + (1 << 12)


def test_resident_blocks_make_room_for_adapters_beside_layer_inputs():
    """In every budget, adapters find room, or a sentence says how much would do: and that does."""
    from peft import LoraConfig, get_peft_model

    plain = model(4)
    ids = tokens(2, 32).cuda()
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    reserve = {"batch_size": 2, "max_tokens": 32}
    adapters = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    least = budget_for(spec_of(plain, **reserve), NONE, 2, 32, "cuda")

    def fails(budget):
        session = offload(
            plain, device="cuda", gpu_memory=budget, cpu_memory="1GiB", training=Training(micro_batches=2), **reserve
        )
        with warnings.catch_warnings(), session:
            warnings.simplefilter("ignore")
            adapted = get_peft_model(session.model, adapters).train()
            try:
                session.backward([lambda: adapted(**batch).loss] * 2)
                session.step(1.0)
            except BudgetExceeded as error:
                return int(re.search(r"\((\d+) bytes\) would do", str(error))[1])
            finally:
                adapted.unload()
        return 0

    enough = {}
    for budget in range(least + 250_000, least + 900_000, 50_000):
        with contextlib.suppress(BudgetTooSmall):
            enough[budget] = fails(budget)
    assert set(enough.values()) != {0}
    assert 0 in enough.values()
    assert not fails(max(enough.values()))
