"""On the pretended card's clock: the link and the compute are busy at the same time, in every phase.

The bound is the larger of what all copies take and what all kernels take, and the first load: nothing hides that one.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

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
STEPS = 4
SLACK = 1.02
RATES = {"the link is slower": 8, "about the same": 1, "compute is slower": 1 / 8}
"""How fast compute is, as a multiple of the speed at which both take as long."""


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


@dataclass
class Running:
    """A phase, step by step.

    Attributes:
        even: device memory's speed, as a multiple of the link's, at which compute takes as long as the link.
        first_bytes: what nothing can hide, in each step.
        once_bytes: the same, in all steps together.
    """

    step: Callable[[], object]
    even: float
    first_bytes: float = 0
    once_bytes: float = 0
    most_copied_bytes: float = float("inf")


@contextmanager
def decode(folder, spare_blocks=2):
    with streamed(model(), spare_blocks) as session, torch.inference_mode():
        assert session.plan.weights.slot_count == 1 + (spare_blocks > 0)
        yield Running(decoding(session), 1, once_bytes=session.plan.weights.slot_bytes)


@contextmanager
def prefill(folder):
    with streamed(model()) as session, torch.inference_mode():
        yield Running(lambda: session.model(tokens(1, 48).cuda()), 9, once_bytes=session.plan.weights.slot_bytes)


@contextmanager
def backward(folder):
    """A step of LoRA: weights come for the forward pass, and in the other order for the backward pass."""
    from peft import LoraConfig, get_peft_model

    plain = model(16)
    spec = spec_of(plain, batch_size=1, max_tokens=TOKENS)
    budget = budget_for(spec, NONE, 1, TOKENS, "cuda") + 6 * max(block.slot_bytes for block in spec.blocks) + 80_000
    options = {"gpu_memory": budget, "cpu_memory": "1GiB", "batch_size": 1, "max_tokens": TOKENS}
    with offload(plain, device="cuda", training=Training(), **options) as session:
        assert len(session.plan.weights.streamed) >= 8
        adapters = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(session.model, adapters).train()
        ids = tokens(1, 32).cuda()

        def step():
            session.backward([lambda: adapted(input_ids=ids, labels=ids, use_cache=False).loss])
            session.step(1.0, overlap=True)

        # Between two steps, the host has the gradients, and the weights of the next forward pass wait for the update.
        yield Running(step, 40, first_bytes=session.plan.weights.slot_bytes, once_bytes=session.plan.weights.slot_bytes)


@contextmanager
def kv_pages(folder):
    """A third stays, and the ring has room for what a layer lacks."""
    plain, length = model(12), 504
    memory = length * 12 * 2 * 2 * 16 * 4 // 3
    options = {"gpu_memory": "64MiB", "cpu_memory": "1GiB", "max_tokens": length + 32, "kv_memory": memory}
    with offload(plain, device="cuda", **options) as session, torch.inference_mode():
        cache = session.kv_cache()
        session.model(tokens(1, 9).cuda().repeat(1, length // 9), past_key_values=cache, use_cache=True)

        def step():
            session.model(tokens(1, 1).cuda(), past_key_values=cache, use_cache=True)

        yield Running(step, 32, first_bytes=session.report().kv["page_bytes"])


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


@contextmanager
def experts(folder, resident=2 / 3, even=10):
    """A prompt that needs all experts of every layer. Which ones the first layer lacks is known when its router has run."""
    plain = mixture()
    plain.save_pretrained(folder / "model")
    layers = find_experts(plain)
    total = sum(unit.count for unit in layers)
    plan = beside(plain, int(resident * total), total)
    options = {"gpu_memory": 1 << 30, "cpu_memory": 1 << 30, "batch_size": 2, "max_tokens": 40}
    with offload(folder / "model", device="cuda", plan=plan, **options) as session, torch.inference_mode():
        ids = tokens(2, 30).cuda()
        lacking, load = total - plan.experts.slots, plan.experts.slot_bytes
        # No more is copied than does not stay, and a few while layers come to lack equally many.
        yield Running(
            lambda: session.model(ids),
            even,
            first_bytes=-(-lacking // len(layers)) * load,
            most_copied_bytes=STEPS * (lacking + 1) * load,
        )


@contextmanager
def most_experts(folder):
    with experts(folder, 5 / 6, even=20) as running:
        yield running


PHASES = {"decode": decode, "prefill": prefill, "backward": backward, "KV pages": kv_pages, "experts": experts,
          "most experts": most_experts}  # fmt: skip


def timed(card, running, rate):
    running.step()
    running.step()
    with speeds(card, RATES[rate] * running.even * LINK):
        makespan, busy = seconds_of(card, running.step, STEPS)
    assert busy["h2d"] > 0
    return makespan, busy, max(busy["h2d"], busy["compute"])


@pytest.mark.parametrize("rate", list(RATES))
@pytest.mark.parametrize("phase", list(PHASES))
def test_what_is_slower_is_all_it_takes(phase, rate, card, tmp_path):
    with PHASES[phase](tmp_path) as running:
        makespan, busy, bound = timed(card, running, rate)
    assert busy["h2d"] * LINK <= running.most_copied_bytes
    unhidden = (STEPS * running.first_bytes + running.once_bytes) / LINK
    assert makespan <= SLACK * bound + unhidden, busy


@pytest.mark.parametrize("phase", list(PHASES))
def test_what_is_loaded_when_it_is_needed_is_not_hidden(phase, card, monkeypatch, tmp_path):
    """That the bound above can be missed."""
    synchronous(monkeypatch)
    with PHASES[phase](tmp_path) as running:
        makespan, busy, bound = timed(card, running, "about the same")
    assert makespan >= 1.5 * bound, busy


def test_without_room_to_look_ahead_nothing_is_hidden(card, tmp_path):
    """One slot. (Where there are two, a host that runs ahead of the card submits loads early enough by itself.)"""
    with decode(tmp_path, spare_blocks=0) as running:
        makespan, busy, bound = timed(card, running, "about the same")
    assert makespan >= 1.5 * bound, busy
