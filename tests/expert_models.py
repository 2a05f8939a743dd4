"""Tiny models with experts: one for every class of experts that transformers decorates, whole models where their configs
can be made small without knowing them, else the class alone between routers."""

import functools
import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from offload.model.experts import find_experts

_DECORATED = re.compile(r"@use_experts_implementation(?:\([^)]*\))?\s*\nclass (\w+)")
_MODELS = re.compile(r"class (\w+ForCausalLM)\(")

_SMALL = {
    "vocab_size": 96, "vocab_size_per_layer_input": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 128, "sliding_window": 16,
    "num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6, "moe_num_experts": 6, "moe_intermediate_size": 24,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "top_k_experts": 2,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "enable_moe_block": True,
    "shared_expert_intermediate_size": 24, "shared_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "mamba_n_groups": 1, "n_groups": 1, "ssm_state_size": 8, "mamba_expand": 2, "expand": 2, "mamba_dt_rank": 4,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "num_nextn_predict_layers": 0, "global_head_dim": 8,
    "hidden_size_per_layer_input": 0,
}  # fmt: skip

_OTHERWISE: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "deepseek_v32": {"num_key_value_heads": 4},
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "axk1": {"num_key_value_heads": 4},
    "axk2": {"num_key_value_heads": 4},
    "mistral4": {"num_key_value_heads": 4, "head_dim": None},
    "beam": {"num_hidden_layers": 4},
    "flint": {"num_hidden_layers": 4},
    "jamba": {"num_hidden_layers": 8},
    "qwen3_next": {"num_hidden_layers": 4},
    "qwen3_5_moe": {"num_hidden_layers": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "zaya": {"num_experts_per_tok": None},
}
"""Where a name means something else, or sizes depend on one another; None leaves a config's own."""


@functools.cache
def decorated() -> dict[str, tuple[str, str, str | None]]:
    """Each decorated class of experts: its module, its name, and a model with it that continues text."""
    found = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        source = path.read_text()
        models = _MODELS.findall(source)
        for name in _DECORATED.findall(source):
            found[name] = (f"transformers.models.{path.parent.name}.{path.stem}", name, models[0] if models else None)
    return found


def make_model(experts: str, dtype: torch.dtype, seed: int = 0) -> tuple[nn.Module, bool]:
    """A model with these experts, and whether it is a whole one of transformers."""
    module_name, class_name, model_name = decorated()[experts]
    module = importlib.import_module(module_name)
    model = None if model_name is None else _whole(module, module_name.split(".")[2], model_name, class_name, seed)
    whole = model is not None
    if model is None:
        torch.manual_seed(seed)
        model = _Routed(getattr(module, class_name), _config_of(module, class_name))
    with torch.no_grad():
        for unit in find_experts(model):
            for parameter in unit.module.parameters():
                # Some classes leave their experts as memory was; and small ones would hide behind the residual.
                parameter.normal_(0, 0.2)
        for parameter in model.parameters():
            if not parameter.isfinite().all():
                parameter.normal_(0, 0.2)
            parameter.data = parameter.data.to(dtype).clone()
    return model.eval(), whole


def _whole(module: ModuleType, family: str, model_name: str, class_name: str, seed: int) -> nn.Module | None:
    kind = getattr(module, model_name)
    torch.manual_seed(seed)
    try:
        config = kind.config_class(**_fields(kind.config_class, _OTHERWISE.get(family, {})))
        model = kind(config).eval()
        with torch.no_grad():
            model(torch.randint(3, 96, (2, 7)))
    except Exception:  # whatever its own checks say of such a small one
        return None
    kinds = {type(unit.module).__name__ for unit in find_experts(model)}
    return model if class_name in kinds else None


def _fields(kind: type, otherwise: dict[str, Any]) -> dict[str, Any]:
    known = vars(kind())
    fields = {name: value for name, value in _SMALL.items() if name in known} | otherwise
    return {name: value for name, value in fields.items() if value is not None}


class _Config(transformers.PreTrainedConfig):
    """Whatever size is asked for, it has it."""

    model_type = "routed"

    def __getattr__(self, name: str) -> Any:
        values = _SMALL | {
            "hidden_act": "silu",
            "hidden_activation": "silu",
            "mlp_hidden_act": "silu",
            "swiglu_limit": 7.0,
            "swiglu_alpha": 1.7,
            "moe_hidden_size": 32,
            "post_norm_eps": 1e-6,
        }
        if name in values:
            return values[name]
        raise AttributeError(name)


def _config_of(module: ModuleType, class_name: str) -> Any:
    """A small config that the class of experts can be made from."""
    return _Config()


class _Block(nn.Module):
    def __init__(self, kind: type, config: Any) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 6)
        self.experts = kind(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weights, index = torch.topk(torch.softmax(self.gate(hidden).float(), dim=-1), 2)
        return hidden + self.experts(hidden, index, weights.to(hidden.dtype))


class _Routed(PreTrainedModel):
    """Two layers of nothing but experts."""

    config_class = _Config
    main_input_name = "hidden"

    def __init__(self, kind: type, config: Any) -> None:
        super().__init__(config)
        config._experts_implementation_internal = "grouped_mm"
        self.embed = nn.Embedding(96, 32)
        self.layers = nn.ModuleList(_Block(kind, config) for _ in range(2))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = self.embed(hidden).reshape(-1, 32)
        for layer in self.layers:
            rows = layer(rows)
        return rows.view(*hidden.shape, 32)
