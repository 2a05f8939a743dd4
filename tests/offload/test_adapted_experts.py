"""LoRA on a mixture of experts as peft's `all-linear` does it: adapters on fused experts and on routers."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from offload import Training, offload
from offload.cli.main import main
from offload.model.checkpoint_folder import find_folder
from tests import oracle_loop
from tests.architectures import oracle_of, tokens
from tests.budgets import ALL, NONE, budget_for, spec_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    # peft of its own patterns.
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]

BATCH, LENGTH = 2, 9
RESERVE = {"batch_size": BATCH, "max_tokens": 16}


def mixture(name, vocab=96):
    torch.manual_seed(0)
    common = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    if name == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**common, intermediate_size=48, num_local_experts=4)).eval()
    sizes = {"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **sizes)).eval()


def adapted(model):
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    found = get_peft_model(model, config)
    assert any("experts" in name for name, _ in found.named_parameters() if "lora_" in name)
    return found.train()


def micro_batches():
    ids = tokens(BATCH, LENGTH)
    return [[{"input_ids": each, "labels": each} for each in (ids, ids.roll(step + 1, 1))] for step in range(3)]


def trained(session, model):
    losses = []
    for group in micro_batches():
        losses += session.backward([lambda batch=batch: model(**batch, use_cache=False).loss / 2 for batch in group])
        session.step(0.5)
    return losses, {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize("residency", [NONE, ALL])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_it_trains_as_plain_peft_does(name, residency, tmp_path):
    model = mixture(name)
    model.save_pretrained(tmp_path)
    twin = adapted(oracle_of(model))
    steps = [[{**batch, "use_cache": False} for batch in group] for group in micro_batches()]
    wanted = oracle_loop.train(twin, steps, clip=0.5, lr=1e-2, weight_decay=0.0)
    # Adapters, gradients and two moments, and one gradient more while it is added.
    budget = budget_for(spec_of(str(tmp_path), **RESERVE), residency, BATCH, 16)
    budget += 4 * sum(value.nbytes for value in twin.parameters() if value.requires_grad) + (1 << 14)
    training = Training(learning_rate=1e-2)
    with offload(str(tmp_path), device="cpu", cpu_memory=budget, training=training, **RESERVE) as session:
        model = adapted(session.model)
        adoptions = []
        adopt = session._parts.residency._adopt_changes
        session._parts.residency._adopt_changes = lambda: adoptions.append(adopt())
        found, adapters = trained(session, model)
        assert bool(session.plan.weights.streamed) == (residency == NONE)
        # Found once: what a parametrisation registers is gone again when a pass is over.
        assert len(adoptions) <= 1
        # Nothing was written to: streamed weights still come from their files.
        assert not any(home.modified for block in session._parts.residency.placement.streamed.values() for home in block.homes)
    assert found == wanted
    plain = twin.state_dict()
    assert all(torch.equal(value, plain[key]) for key, value in adapters.items())


def test_the_command_with_its_defaults_and_what_is_made_of_it(capsys, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(find_folder("demo"))
    folder, data = tmp_path / "model", tmp_path / "data.jsonl"
    mixture("mixtral", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data.write_text("\n".join(json.dumps({"text": f"In the beginning {number}"}) for number in range(4)))
    adapter, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    common = ["--data", str(data), "--device", "cpu", "--cpu-memory", "32MiB", "--learning-rate", "1e-2", "--quiet"]
    assert main(["finetune", str(folder), *common, "--output", adapter]) == 0, capsys.readouterr().err
    assert main(["merge", str(folder), "--adapter", adapter, "--output", merged]) == 0, capsys.readouterr().err
    ids = tokens(1, 9)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        before = plain(ids).logits
        wanted = PeftModel.from_pretrained(plain, adapter).eval()(ids).logits
        found = AutoModelForCausalLM.from_pretrained(merged).eval()(ids).logits
    assert not torch.allclose(before, wanted, atol=1e-4)
    assert torch.allclose(found, wanted, atol=1e-5)
    with offload(folder, device="cpu", cpu_memory="32MiB", expert_policy="layers", **RESERVE) as session, torch.no_grad():
        offloaded = PeftModel.from_pretrained(session.model, adapter).eval()
        assert torch.equal(offloaded(ids).logits, wanted)
    capsys.readouterr()
    generate = ["generate", str(folder), "--adapter", adapter, "--prompt", "In the", "--max-new-tokens", "4", "--device", "cpu"]
    assert main([*generate, "--cpu-memory", "32MiB"]) == 0, capsys.readouterr().err
