"""Models whose parts are copied, removed, moved or replaced while they are offloaded: as plain transformers computes with them."""

import copy

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch import nn

from offload import offload
from tests.architectures import make, tokens
from tests.budgets import ALL, NONE, SOME, SPLIT, budget_for, enter, spec_of
from tests.poison import poison_homes

RESIDENCIES = [SPLIT, NONE, SOME, ALL]


def remove_the_first(model):
    del model.model.layers[0]


def keep_the_first_three(model):
    model.model.layers = model.model.layers[:3]


def reverse(model):
    model.model.layers = nn.ModuleList(list(model.model.layers)[::-1])


def swap_two(model):
    layers = model.model.layers
    layers[1], layers[3] = layers[3], layers[1]


def use_one_twice(model):
    model.model.layers = nn.ModuleList([*model.model.layers, model.model.layers[2]])


def empty_one(model):
    model.model.layers[2].mlp = nn.Identity()


def shorten_and_add(model):
    keep_the_first_three(model)
    model.model.layers[1].mlp.extra = nn.Identity()


CHANGES = [remove_the_first, keep_the_first_three, reverse, swap_two, use_one_twice, empty_one, shorten_and_add]


# A layer that is there twice has no place of its own in a cache.
def options_of(change):
    return {"max_new_tokens": 4, "do_sample": False, "use_cache": change is not use_one_twice}


def budget_of(model, residency):
    """Bytes; the least that is named, in which layers are streamed by their parts, is less than anything."""
    return 1024 if residency == SPLIT else budget_for(spec_of(model), residency, 2, 16)


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("change", CHANGES)
def test_layers_are_removed_and_moved(change, residency):
    model, plain, options = make("llama"), make("llama"), options_of(change)
    change(plain)
    expected = plain.generate(tokens(), **options)
    with enter(model, budget_of(model, residency), batch_size=2, max_tokens=16) as session:
        assert bool(session._parts.residency.by_submodule) == (residency == SPLIT)
        model.generate(tokens(), **options)
        change(model)
        with torch.no_grad():
            model(input_ids=tokens(), use_cache=False)
        poison_homes(session)
        assert torch.equal(model.generate(tokens(), **options), expected)


@pytest.mark.parametrize("residency", [SPLIT, SOME])
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_removed_stays_so(change, residency):
    model, plain = make("llama"), make("llama")
    change(plain)
    with enter(model, budget_of(model, residency), batch_size=2, max_tokens=16):
        change(model)
        model.generate(tokens(), **options_of(change))
    state = model.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    assert torch.equal(model.generate(tokens(), **options_of(change)), plain.generate(tokens(), **options_of(change)))


LORA = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
ADAPTERS = {
    "head": lambda: LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "embedding": lambda: LoraConfig(**LORA, modules_to_save=["embed_tokens"]),
    "norm in layers": lambda: LoraConfig(**LORA, modules_to_save=["input_layernorm"]),
    "whole mlp": lambda: LoraConfig(**LORA, modules_to_save=["mlp"]),
    "norms": lambda: LNTuningConfig(task_type="CAUSAL_LM"),
    "layers again": lambda: LoraConfig(**LORA, layer_replication=[[0, 3], [1, 4]]),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning", "ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize("residency", [SPLIT, NONE, ALL])
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_peft_copies_modules_of_an_offloaded_model(adapters, residency):
    model, plain = make("llama"), make("llama")
    budget = budget_of(model, residency) + (1 << 20)
    inputs = {"input_ids": tokens(), "labels": tokens(), "use_cache": False}

    def train(adapted):
        trained = [value for value in adapted.parameters() if value.requires_grad]
        optimizer, losses = torch.optim.SGD(trained, lr=0.01), []
        for _ in range(3):
            output = adapted(**inputs)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(output.loss.item())
        return losses

    torch.manual_seed(3)
    theirs = get_peft_model(plain, ADAPTERS[adapters]()).train()
    expected = train(theirs)
    with offload(model, device="cpu", cpu_memory=budget, batch_size=2, max_tokens=16, training=True) as session:
        torch.manual_seed(3)
        mine = get_peft_model(session.model, ADAPTERS[adapters]()).train()
        found = train(mine)
    assert found == expected
    ours, others = mine.state_dict(), theirs.state_dict()
    assert list(ours) == list(others)
    assert all(torch.equal(value, others[name]) for name, value in ours.items())
    assert not any(
        "forward" in vars(module) and module.forward.__func__ is not type(module).forward for module in mine.modules()
    )


def test_a_copy_of_a_part_is_a_plain_module():
    model, plain = make("llama"), make("llama")
    budget = budget_for(spec_of(model), NONE, 2, 16)
    hidden = torch.randn(2, 3, 32)
    with offload(model, device="cpu", cpu_memory=budget, batch_size=2, max_tokens=16) as session:
        copied = copy.deepcopy(model.model.layers[1])
        moved = session.machine.ledger.used_bytes
        with torch.no_grad():
            found = copied.mlp(hidden)
            copied.mlp.up_proj.weight.zero_()
        assert session.machine.ledger.used_bytes == moved
        assert torch.equal(found, plain.model.layers[1].mlp(hidden))
        assert torch.equal(model.model.layers[1].mlp.up_proj.weight, plain.model.layers[1].mlp.up_proj.weight)
    copied.mlp(hidden)
