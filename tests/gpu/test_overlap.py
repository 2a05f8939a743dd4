"""On the pretended card's clock: the link and the compute are busy at the same time, in every phase.

The bound is the larger of what all copies take and what all kernels take, and the first load: nothing hides that one.
"""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from offload import Training, offload
from offload.model.experts import find_experts
from offload.storage.devices.cuda import CudaDevice
from tests.architectures import tokens
from tests.budgets import NONE, budget_for, spec_of
from tests.gpu.timed import LINK, seconds_of, speeds
from tests.offload.test_experts import beside

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

TOKENS = 64
SLACK = 1.02
RATES = {"the link is slower": 8 * LINK, "about the same": LINK, "compute is slower": LINK / 8}


def model(layers=8):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).eval()


def streamed(plain, spare_blocks=2, **options):
    """By default there are two slots, and one layer stays."""
    spec = spec_of(plain, batch_size=1, max_tokens=TOKENS)
    largest = max(block.slot_bytes for block in spec.blocks)
    budget = budget_for(spec, NONE, 1, TOKENS, "cuda") + 16_384 + spare_blocks * largest
    return offload(plain, device="cuda", gpu_memory=budget, cpu_memory="1GiB", batch_size=1, max_tokens=TOKENS, **options)


def synchronous(monkeypatch):
    real = CudaDevice.copy_in

    def awaited(self, copies, after=(), name=""):
        event = real(self, copies, after, name)
        event.synchronize()
        return event

    monkeypatch.setattr(CudaDevice, "copy_in", awaited)


def decoding(session):
    """One more token, each time it is called."""
    state = {}

    def step():
        held = state.get("output")
        ids = tokens(1, 9).cuda() if held is None else held.logits[:, -1:].argmax(-1)
        state["output"] = session.model(ids, past_key_values=held and held.past_key_values, use_cache=True)

    step()
    step()
    return step


def first_load(session):
    return session.plan.weights.slot_bytes / LINK


@pytest.mark.parametrize("rate", list(RATES))
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_forward(phase, rate, card):
    with streamed(model()) as session, torch.inference_mode():
        assert session.plan.weights.slot_count == 2
        step = decoding(session) if phase == "decode" else lambda: session.model(tokens(1, 48).cuda())
        step()
        with speeds(card, RATES[rate]):
            makespan, busy = seconds_of(card, step)
        assert makespan <= SLACK * max(busy["h2d"], busy["compute"]) + first_load(session), busy


def test_what_is_loaded_when_it_is_needed_is_not_hidden(card, monkeypatch):
    """That the bound above can be missed."""
    synchronous(monkeypatch)
    with streamed(model()) as session, torch.inference_mode():
        step = decoding(session)
        with speeds(card, LINK):
            makespan, busy = seconds_of(card, step)
        assert makespan >= 1.5 * max(busy["h2d"], busy["compute"])


def test_without_room_to_look_ahead_nothing_is_hidden(card):
    """One slot. (Where there are two, a host that runs ahead of the card submits loads early enough by itself.)"""
    with streamed(model(), spare_blocks=0) as session, torch.inference_mode():
        assert session.plan.weights.slot_count == 1
        step = decoding(session)
        with speeds(card, LINK):
            makespan, busy = seconds_of(card, step)
        assert makespan >= 1.5 * max(busy["h2d"], busy["compute"])


@pytest.mark.parametrize("rate", ["the link is slower", "compute is slower"])
def test_backward(rate, card):
    """A step of LoRA: weights come for the forward pass, and in the other order for the backward pass."""
    from peft import LoraConfig, get_peft_model

    plain = model(16)
    spec = spec_of(plain, batch_size=1, max_tokens=TOKENS)
    slot = max(block.slot_bytes for block in spec.blocks)
    budget = budget_for(spec, NONE, 1, TOKENS, "cuda") + 6 * slot + 80_000
    options = {"gpu_memory": budget, "cpu_memory": "1GiB", "batch_size": 1, "max_tokens": TOKENS}
    with offload(plain, device="cuda", training=Training(), **options) as session:
        assert len(session.plan.weights.streamed) >= 8
        adapters = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(session.model, adapters).train()
        ids = tokens(1, 32).cuda()

        def step():
            session.backward([lambda: adapted(input_ids=ids, labels=ids, use_cache=False).loss])
            session.step(1.0, overlap=True)

        step(), step()
        with speeds(card, 40 * RATES[rate]):
            makespan, busy = seconds_of(card, step)
        # Between two steps, the host has the gradients, and the weights of the next forward pass wait for the update.
        turn = 4 * first_load(session)
        assert makespan <= SLACK * max(busy["h2d"], busy["compute"]) + first_load(session) + turn, busy


@pytest.mark.parametrize("rate", ["the link is slower", "compute is slower"])
def test_kv_pages(rate, card):
    plain, length = model(4), 1008
    memory = length * 4 * 2 * 2 * 16 * 4 // 2
    with (
        offload(
            plain, device="cuda", gpu_memory="64MiB", cpu_memory="1GiB", max_tokens=length + 32, kv_memory=memory
        ) as session,
        torch.inference_mode(),
    ):
        cache = session.kv_cache()
        session.model(tokens(1, 9).cuda().repeat(1, length // 9), past_key_values=cache, use_cache=True)

        def step():
            session.model(tokens(1, 1).cuda(), past_key_values=cache, use_cache=True)

        step()
        with speeds(card, {"the link is slower": 400, "compute is slower": 1}[rate] * LINK):
            makespan, busy = seconds_of(card, step)
        assert busy["h2d"] > 0
        page = session.report().kv["page_bytes"] / LINK
        assert makespan <= SLACK * max(busy["h2d"], busy["compute"]) + 4 * page, busy


def mixture():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    return MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("resident", [2 / 3, 5 / 6])
@pytest.mark.parametrize("rate", list(RATES))
def test_experts(rate, resident, card, tmp_path):
    """A prompt that needs all experts of every layer. Which ones the first layer lacks is known when its router has run."""
    plain = mixture()
    plain.save_pretrained(tmp_path / "model")
    layers = find_experts(plain)
    total = sum(unit.count for unit in layers)
    plan = beside(plain, int(resident * total), total)
    options = {"gpu_memory": 1 << 30, "cpu_memory": 1 << 30, "batch_size": 2, "max_tokens": 40}
    with offload(tmp_path / "model", device="cuda", plan=plan, **options) as session, torch.inference_mode():
        ids = tokens(2, 30).cuda()

        def step():
            session.model(ids)

        step(), step()
        with speeds(card, {"the link is slower": 64, "about the same": 10, "compute is slower": 2}[rate] * LINK):
            makespan, busy = seconds_of(card, step)
        load = plan.experts.slot_bytes / LINK
        lacking = total - plan.experts.slots
        # No more is copied than does not stay, and a few while layers come to lack equally many.
        assert busy["h2d"] <= 4 * (lacking + 1) * load
        first = -(-lacking // len(layers)) * load
        assert makespan <= SLACK * max(busy["h2d"], busy["compute"]) + 4 * first, busy
