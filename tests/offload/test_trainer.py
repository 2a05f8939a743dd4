"""transformers' own Trainer: inside of a session, with peft; and as the oracle of what a step learns."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from offload import SessionError, Training, offload, token_shares
from offload.finetune.data import Batches, read_examples
from offload.finetune.loop import train
from offload.finetune.recipe import Recipe
from offload.model.checkpoint_folder import find_folder
from tests.architectures import make, oracle_of, tokens
from tests.budgets import NONE, budget_for, spec_of

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

RATE = 1e-3
SHORT, LONG = " Amen.", " And the king said unto them, " * 16


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Answers of a few tokens and of many."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [{"prompt": "In the beginning", "completion": answer} for answer in (SHORT, LONG, LONG, SHORT, SHORT)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return read_examples(path, AutoTokenizer.from_pretrained(find_folder("demo")), 256)


def adapted(model, **more):
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **more)
    return get_peft_model(model, config)


def collated(rows):
    return next(Batches([row["example"] for row in rows], len(rows)).in_order())


def trainer_of(model, rows, folder, batch_size, accumulation, collate, **more):
    settings = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=0,
        **more,
    )

    class InOrder(Trainer):
        def _get_train_sampler(self, *ignored):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder(model=model, args=settings, train_dataset=rows, data_collator=collate)


def logged(trainer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return [(entry["loss"], entry["grad_norm"]) for entry in steps]


def plain_demo():
    return AutoModelForCausalLM.from_pretrained(find_folder("demo"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def by_trainer(examples, tmp_path_factory):
    """(loss, norm) of the first step, of two examples: accumulated, and in one batch."""
    rows = [{"example": example} for example in examples[:2]]
    found = []
    for size, accumulation in ((1, 2), (2, 1)):
        folder = tmp_path_factory.mktemp("trainer")
        found += logged(trainer_of(adapted(plain_demo()), rows, folder, size, accumulation, collated))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    return found[1]


@pytest.mark.parametrize("layer_major", [True, False])
@pytest.mark.parametrize(("size", "accumulation"), [(1, 2), (2, 1)])
def test_a_token_counts_the_same_in_whatever_batch(size, accumulation, layer_major, examples, by_trainer):
    steps = []
    with offload(
        "demo", device="cpu", dtype="float32", cpu_memory="96MiB", batch_size=5, max_tokens=256, training=Training()
    ) as session:
        model = adapted(session.model)
        batches = Batches(examples[:2], size)
        recipe = Recipe(learning_rate=RATE, gradient_accumulation=accumulation, layer_major=layer_major)
        train(session, model, batches, recipe, steps.append, evaluation=Batches(examples, 2))
        # The last batch of the evaluation has one example, the others two of different lengths.
        model.eval()
        with torch.no_grad():
            whole = next(Batches(examples, len(examples)).in_order())
            evaluated = float(model(**whole, use_cache=False).loss)
    assert (steps[0].loss, steps[0].gradient_norm) == pytest.approx(by_trainer, rel=1e-3)
    assert steps[0].eval_loss == pytest.approx(evaluated, rel=1e-5)


def test_a_last_step_of_fewer_batches_counts_by_its_own_tokens(examples, tmp_path):
    """Five examples, two batches of one a step: the last step has one."""
    rows = [{"example": example} for example in sorted(examples, key=lambda example: len(example.ids))]
    wanted = logged(trainer_of(adapted(plain_demo()), rows, tmp_path, 1, 2, collated))
    steps = []

    class InOrder(Batches):
        def epoch(self, number):
            return self.in_order()

    with offload(
        "demo", device="cpu", cpu_memory="64MiB", batch_size=1, max_tokens=256, training=Training(), dtype="float32"
    ) as session:
        batches = InOrder([row["example"] for row in rows], 1)
        recipe = Recipe(learning_rate=RATE, gradient_accumulation=2)
        train(session, adapted(session.model), batches, recipe, steps.append)
    assert len(wanted) == 3
    found = [(step.loss, step.gradient_norm) for step in steps]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_the_documented_loop(examples, by_trainer):
    batches = list(Batches(examples[:2], 1).in_order())
    with offload(
        "demo", device="cpu", dtype="float32", cpu_memory="96MiB", batch_size=5, max_tokens=256, training=Training()
    ) as session:
        model = adapted(session.model)
        losses = []
        for batch, share in zip(batches, token_shares(batches), strict=True):
            loss = model(**batch, use_cache=False).loss * share
            loss.backward()
            losses.append(loss.item())
        norm = session.step(max_grad_norm=1.0)
        shares = token_shares([{"shift_labels": batch["labels"][:, 1:]} for batch in batches])
        assert shares == token_shares(batches)
    assert (sum(losses), norm) == pytest.approx(by_trainer, rel=1e-3)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_peft_and_trainer_inside_of_a_session(accumulation, tmp_path):
    """Losses and adapters are those of plain training, bit by bit."""
    model = make("llama", True)
    twin = oracle_of(model)
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 9)]

    def collate(items):
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    def trained(model, name):
        found = logged(trainer_of(model, rows, tmp_path / name, 2, accumulation, collate))
        return found, {key: value.clone() for key, value in model.state_dict().items() if "lora_" in key}

    wanted = trained(adapted(twin, lora_dropout=0.1), "plain")
    reserve = {"batch_size": 2, "max_tokens": 16}
    budget = budget_for(spec_of(model, **reserve), NONE, 2, 16) + (1 << 16)
    with offload(model, device="cpu", cpu_memory=budget, training=True, **reserve) as session:
        assert session.plan.weights.streamed
        found = trained(adapted(session.model, lora_dropout=0.1), "offloaded")
    assert found[0] == wanted[0]
    assert found[1].keys() == wanted[1].keys()
    assert all(torch.equal(value, wanted[1][name]) for name, value in found[1].items())


def test_a_wrapper_moves_nothing_where_nothing_would_move():
    model = make("llama", True)
    with offload(model, device="cpu", cpu_memory="64MiB", batch_size=2, max_tokens=16) as session:
        wrapper = nn.Sequential(session.model)
        before = session.model(tokens()).logits.clone()
        for unmoved in (
            wrapper.to("cpu"),
            wrapper.float(),
            wrapper.cpu(),
            wrapper.to(torch.float32),
            wrapper.to("cpu", torch.float32),
        ):
            assert unmoved is wrapper
        assert wrapper.to(memory_format=torch.channels_last) is wrapper
        assert torch.equal(session.model(tokens()).logits, before)
        moves = (
            wrapper.half,
            wrapper.double,
            lambda: wrapper.to("meta"),
            lambda: wrapper.to(torch.bfloat16),
            lambda: wrapper.to_empty(device="cpu"),
            wrapper.share_memory,
        )
        for move in moves:
            with pytest.raises(SessionError, match="Converting or moving"):
                move()
        assert torch.equal(session.model(tokens()).logits, before)


def test_another_memory_format_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).eval()
    image = torch.randn(1, 3, 8, 8)
    with offload(model, device="cpu", cpu_memory="64MiB") as session, torch.no_grad():
        for move in (session.model.to, nn.Sequential(session.model).to):
            with pytest.raises(SessionError):
                move(memory_format=torch.channels_last)
        session.model(image)
