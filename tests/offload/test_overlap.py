"""On the CPU, from disk to memory: reads and compute at the same time, by a virtual clock and in counts of waits.

The bound is the larger of what all reads take and what all layers compute, and the first load: nothing hides that one.
"""

from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offload import Training
from tests.architectures import tokens
from tests.budgets import NONE, budget_for, enter, spec_of
from tests.virtual_disk import virtual_disk

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

TOKENS, LAYERS, STEPS = 64, 8, 3
RATES = {"the disk is slower": 4.0, "about the same": 1.0, "compute is slower": 0.25}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def decoding(session):
    """One more token, each time it is called."""
    held = []

    def step():
        ids = tokens(1, 9) if not held else held[-1].logits[:, -1:].argmax(-1)
        held[:] = [session.model(ids, past_key_values=held[-1].past_key_values if held else None, use_cache=True)]

    return step


def prompting(session):
    return lambda: session.model(tokens(1, 32))


def learning(session):
    """A step of LoRA."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(session.model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    ids = tokens(1, 16)

    def step():
        session.backward([lambda: adapted(input_ids=ids, labels=ids, use_cache=False).loss])
        session.step(1.0)

    return step


PHASES = {"decode": decoding, "prefill": prompting, "backward": learning}


def run(phase, folder, monkeypatch, speed, spare_blocks=2):
    """The clock after some steps, and the seconds of one load: all loads and all layers take as long at `speed` 1."""
    spec = spec_of(folder, batch_size=1, max_tokens=TOKENS)
    largest = max(block.slot_bytes for block in spec.blocks)
    budget = budget_for(spec, NONE, 1, TOKENS) + spare_blocks * largest
    learns = phase == "backward"
    options = {"batch_size": 1, "max_tokens": TOKENS} | ({"training": Training()} if learns else {})
    with enter(folder, budget + learns * (1 << 20), **options) as session, torch.inference_mode(not learns):
        weights = session.plan.weights
        step = PHASES[phase](session)
        step(), step()
        streamed = [key for key in weights.streamed if "layers" in key]
        rate = weights.slot_bytes * LAYERS / len(streamed)
        with virtual_disk(session, monkeypatch, rate) as disk:
            # Inside of the layer, while its block is open; once more when it is computed again.
            layers = session.model.model.layers
            hooks = [layer.mlp.register_forward_hook(lambda *_: disk.compute(1 / speed)) for layer in layers]
            for _ in range(STEPS):
                step()
            for hook in hooks:
                hook.remove()
            return Clock(disk.now, disk.reading, disk.computing, disk.waits, weights.slot_bytes / rate, len(streamed))


@dataclass(frozen=True)
class Clock:
    makespan: float
    reading: float
    computing: float
    waits: int
    load_seconds: float
    streamed: int

    @property
    def bound(self):
        return max(self.reading, self.computing)


@pytest.mark.parametrize("speed", list(RATES))
@pytest.mark.parametrize("phase", list(PHASES))
def test_what_is_slower_is_all_it_takes(phase, speed, folder, monkeypatch):
    found = run(phase, folder, monkeypatch, RATES[speed])
    assert found.makespan <= 1.02 * found.bound + found.load_seconds, found
    if speed == "compute is slower":
        assert not found.waits


@pytest.mark.parametrize("phase", list(PHASES))
def test_without_room_to_look_ahead_every_load_is_waited_for(phase, folder, monkeypatch):
    found = run(phase, folder, monkeypatch, 1.0, spare_blocks=0)
    assert found.makespan >= 1.5 * found.bound, found
    assert found.waits >= STEPS * found.streamed
