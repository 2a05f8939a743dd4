"""Foreign adapter configs: whatever peft saves is taken, and a value of another type is named before peft has it."""

import json

import peft
import pytest

from offload.adapters.config_types import check_types
from offload.storage.errors import ConfigError

SAVED = [
    peft.LoraConfig(r=8, target_modules="all-linear"),
    peft.LoraConfig(
        target_modules=["q_proj"],
        alora_invocation_tokens=[1, 2],
        layer_replication=[(0, 2)],
        rank_pattern={"q_proj": 3},
        init_lora_weights="pissa",
        modules_to_save=["lm_head"],
        loftq_config={},
        task_type="CAUSAL_LM",
    ),
    peft.LoraConfig(trainable_token_indices={"embed_tokens": [1, 2]}, target_parameters=["experts.down_proj"]),
    peft.IA3Config(),
    peft.LNTuningConfig(),
    peft.LoHaConfig(),
    peft.OFTConfig(),
    peft.VeraConfig(),
    peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    peft.AdaLoraConfig(total_step=10),
]


@pytest.mark.parametrize("config", SAVED, ids=lambda config: type(config).__name__)
def test_what_peft_saves_is_taken(config, tmp_path):
    config.save_pretrained(tmp_path)
    check_types(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alora_invocation_tokens", "3"),
        ("alora_invocation_tokens", ["3"]),
        ("r", "8"),
        ("r", 8.5),
        ("r", float("inf")),
        ("lora_dropout", "much"),
        ("target_modules", 3),
        ("rank_pattern", [1]),
        ("bias", 7),
        ("use_dora", "yes"),
        ("layers_to_transform", ["first"]),
        ("layer_replication", [[0, "last"]]),
        ("peft_type", "NONE_OF_THEM"),
    ],
)
def test_a_value_of_another_type_is_named(name, value, tmp_path):
    SAVED[0].save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ConfigError, match="NONE_OF_THEM" if name == "peft_type" else f"{name} is|infinity"):
        check_types(str(tmp_path))
