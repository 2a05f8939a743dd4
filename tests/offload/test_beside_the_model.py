"""Parameters that a loss depends on and the model does not hold: trained by whoever steps them, or told."""

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from offload import SessionError, Training
from tests.architectures import make, oracle_of, tokens
from tests.budgets import NONE, budget_for, enter, spec_of

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

RESERVE = {"batch_size": 2, "max_tokens": 40}


def entered(model, training):
    budget = budget_for(spec_of(model, **RESERVE), NONE, 2, 40) + (2 << 20)
    return enter(model, budget, training=training, **RESERVE)


def head_of(model):
    torch.manual_seed(1)
    return torch.nn.Linear(model.config.hidden_size, 1)


def value_loss(model, head):
    hidden = model(tokens(), output_hidden_states=True, use_cache=False).hidden_states[-1]
    return head(hidden).square().mean()


@pytest.mark.parametrize("times", [1, 2])
def test_a_value_head_beside_the_model_is_told_of(times):
    model = make("llama")
    head = head_of(model)
    with (
        entered(model, Training(full=True)) as session,
        pytest.warns(UserWarning, match=r"depends on [12] parameters beside"),
    ):
        session.backward([lambda: value_loss(session.model, head) / times] * times)
    assert head.weight.grad is not None


def test_as_a_part_of_the_model_it_is_trained():
    model = make("llama")
    model.value_head = head_of(model)
    before = model.value_head.weight.detach().clone()
    with entered(model, Training(full=True, learning_rate=1e-2)) as session:
        session.backward([lambda: value_loss(session.model, session.model.value_head)])
        session.step(1.0)
        session.finish()
    assert not torch.equal(model.value_head.weight, before)


def test_further_groups_are_refused():
    model = make("llama")
    with (
        entered(model, Training(full=True)) as session,
        pytest.raises(SessionError, match=r"steps the parameters of the model .* or step them by an optimizer of your own"),
    ):
        session.optimizer.add_param_group({"params": head_of(model).parameters()})


def prompted(model):
    torch.manual_seed(2)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return get_peft_model(model, config).train()


def test_prompts_are_trained_by_ones_own_optimizer_and_told_of_otherwise():
    model = make("llama")
    twin = prompted(oracle_of(model))
    batch = {"input_ids": tokens(), "labels": tokens()}

    def steps(trained):
        optimizer = torch.optim.SGD([value for value in trained.parameters() if value.requires_grad], lr=1.0)
        losses = []
        for _ in range(3):
            loss = trained(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    wanted = steps(twin)
    with entered(model, True) as session:
        ours = prompted(session.model)
        assert steps(ours) == wanted
        with pytest.raises(SessionError, match=r"no parameter of the model requires a gradient\. If parameters beside it do"):
            _ = session.optimizer
