"""State-space and hybrid models, and others whose code reads weights of a sub-module without calling it."""

import pytest
import torch
import transformers as hf
from torch import nn

from offload import BudgetTooSmall, offload
from offload.planning.dry_run import DryRun
from offload.planning.pass_splits import ways_to_split
from offload.scheduler.model_spec import Workload
from tests.architectures import VOCAB, make, tokens
from tests.poison import poison_homes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TEXT = _SIZES | {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
_HEADS = {"n_groups": 1, "chunk_size": 8}
_MAMBA2 = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
_DEBERTA = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
    "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "max_position_embeddings": 64,
}  # fmt: skip

MODELS = {
    "mamba2": lambda: hf.Mamba2ForCausalLM(hf.Mamba2Config(**_SIZES, state_size=8, num_heads=4, head_dim=16, **_HEADS)),
    "falcon_mamba": lambda: hf.FalconMambaForCausalLM(hf.FalconMambaConfig(**_SIZES, state_size=8)),
    "nemotron_h": lambda: hf.NemotronHForCausalLM(
        hf.NemotronHConfig(
            **_TEXT, hybrid_override_pattern="M*M-", ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=16, head_dim=8, **_HEADS
        )
    ),
    "bamba": lambda: hf.BambaForCausalLM(hf.BambaConfig(**_TEXT, attn_layer_indices=[1], **_MAMBA2)),
    "falcon_h1": lambda: hf.FalconH1ForCausalLM(hf.FalconH1Config(**_TEXT, mamba_d_ssm=64, **_MAMBA2)),
    "zamba2": lambda: hf.Zamba2ForCausalLM(
        hf.Zamba2Config(
            **_TEXT, mamba_d_state=8, n_mamba_heads=4, mamba_ngroups=1, chunk_size=8, hybrid_layer_ids=[1],
            layers_block_type=["mamba", "hybrid", "mamba", "mamba"],
        )
    ),
    "lfm2": lambda: hf.Lfm2ForCausalLM(
        hf.Lfm2Config(**_TEXT, layer_types=["conv", "full_attention", "conv", "conv"], block_multiple_of=8)
    ),
    "recurrent_gemma": lambda: hf.RecurrentGemmaForCausalLM(
        hf.RecurrentGemmaConfig(**_TEXT, lru_width=32, attention_window_size=16)
    ),
    "jamba": lambda: hf.JambaForCausalLM(
        hf.JambaConfig(
            **_TEXT, mamba_d_state=8, num_experts=2, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1,
            use_mamba_kernels=False,
        )
    ),
    "qwen3_next": lambda: hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**_TEXT, head_dim=8, **_LINEAR, **_EXPERTS)),
    "deberta_v2": lambda: hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**_DEBERTA)),
}  # fmt: skip


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for value in model.parameters():
        value.data = value.data.clone()
    return model


def given(model):
    with torch.no_grad():
        if not model.can_generate():
            return [model(tokens()).logits]
        options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        return model.generate(tokens(), **options).logits


@pytest.mark.parametrize("name", MODELS)
def test_the_least_budget_is_exact_and_reads_no_home(name):
    """Of blocks that are taken apart: what is read without being called stays with what reads it."""
    model = made(name)
    wanted = given(model)
    with pytest.raises(BudgetTooSmall) as refused:
        offload(model, device="cpu", cpu_memory=1, batch_size=2, max_tokens=12).__enter__()
    with offload(model, device="cpu", cpu_memory=refused.value.least_bytes, batch_size=2, max_tokens=12) as session:
        assert session._parts.residency.by_submodule
        poison_homes(session)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(given(session.model), wanted, strict=True))
        kv = session.report().kv
        assert kv["peak_bytes"] <= kv["reserved_bytes"] or name == "recurrent_gemma"


@pytest.mark.parametrize(
    ("name", "states"),
    [("mamba2", 4 * (8 * 64 + 4 * (64 + 2 * 8))), ("lfm2", 3 * 3 * 32), ("falcon_mamba", 4 * 64 * (8 + 4))],
)
def test_states_are_counted_by_the_models_own_code(name, states):
    """Elements of one sequence, in fp32: recurrent and convolution states of each layer."""
    model = made(name)
    with offload(model, device="cpu", cpu_memory="64MiB", batch_size=2, max_tokens=12) as session:
        assert session._parts.residency.spec.state_bytes_per_sequence == 4 * states


@pytest.mark.parametrize(
    ("name", "may"),
    [("mamba2", False), ("recurrent_gemma", False), ("jamba", False), ("qwen3_next", True), ("bamba", True), ("lfm2", True)],
)
def test_prompts_are_chunked_only_where_the_cache_is_taken_up(name, may):
    """`generate` of mamba2 makes no cache; Jamba's layers take up their state for a single token only."""
    chunks = [way for way in ways_to_split(made(name), Workload(1, 512, 512)) if way.prefill_chunk]
    assert bool(chunks) == may


def test_attention_reads_all_of_its_cache():
    assert DryRun(make("llama")).reads_its_cache()
    assert DryRun(make("gemma3")).reads_its_cache()
