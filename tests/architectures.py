"""Tiny random models of many architectures, and the inputs that they take."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn

VOCAB = 96

_TEXT = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
         "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
_GROUPED = _TEXT | {"num_key_value_heads": 2, "head_dim": 8}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Architecture:
    """A family of models.

    Attributes:
        make: given tied or not, a model with random weights.
        inputs: what one plain forward takes.
        generates: a decoder that `generate` works on.
        can_tie: whether input and output embeddings can be one tensor, and can be two.
    """

    name: str
    make: Callable[[bool], nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    generates: bool
    ties: tuple[bool, ...] = (False, True)

    def __str__(self) -> str:
        return self.name


def tokens(rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


def text_inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}


def _both_inputs() -> dict[str, torch.Tensor]:
    return text_inputs() | {"decoder_input_ids": tokens(2, 4)}


def _pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(6))}


def _clip_inputs() -> dict[str, torch.Tensor]:
    return text_inputs() | _pixels()


def _llava_inputs() -> dict[str, torch.Tensor]:
    ids = tokens()
    ids[:, 1:5] = VOCAB - 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | _pixels()


def _decoder(name: str, config: type, model: type, ties: tuple[bool, ...] = (False, True), **fields: Any) -> Architecture:
    def make(tied: bool) -> nn.Module:
        return model(config(**fields, tie_word_embeddings=tied))

    return Architecture(name, make, text_inputs, True, ties)


def _clip(tied: bool) -> nn.Module:
    text = {key: value for key, value in _TEXT.items() if key not in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text | {"eos_token_id": 2}, vision_config=_VISION, projection_dim=16))


def _llava(tied: bool) -> nn.Module:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_VISION),
        text_config=hf.LlamaConfig(**_GROUPED),
        image_token_index=VOCAB - 1,
        vision_feature_layer=-1,
        tie_word_embeddings=tied,
    )
    return hf.LlavaForConditionalGeneration(config)


_OPT = {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "max_position_embeddings": 128, "word_embed_proj_dim": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4,
       "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}  # fmt: skip
_BART = {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 128,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None}  # fmt: skip
_MIXTRAL = _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
_BERT = {key: value for key, value in _TEXT.items() if key not in ("bos_token_id", "eos_token_id")}

ARCHITECTURES = [
    _decoder("llama", hf.LlamaConfig, hf.LlamaForCausalLM, **_GROUPED),
    _decoder("qwen2", hf.Qwen2Config, hf.Qwen2ForCausalLM, **_GROUPED),
    _decoder("qwen3", hf.Qwen3Config, hf.Qwen3ForCausalLM, **_GROUPED),
    _decoder("gemma2", hf.Gemma2Config, hf.Gemma2ForCausalLM, **_GROUPED, sliding_window=4),
    _decoder("gemma3", hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, **_GROUPED, sliding_window=4),
    _decoder("mistral", hf.MistralConfig, hf.MistralForCausalLM, **_GROUPED),
    _decoder("phi3", hf.Phi3Config, hf.Phi3ForCausalLM, **_TEXT, num_key_value_heads=2),
    _decoder("gpt2", hf.GPT2Config, hf.GPT2LMHeadModel, **_GPT2),
    _decoder("opt", hf.OPTConfig, hf.OPTForCausalLM, **_OPT),
    _decoder("falcon", hf.FalconConfig, hf.FalconForCausalLM, **_TEXT),
    _decoder("gpt_neox", hf.GPTNeoXConfig, hf.GPTNeoXForCausalLM, **_TEXT),
    _decoder("mixtral", hf.MixtralConfig, hf.MixtralForCausalLM, **_MIXTRAL),
    _decoder("bloom", hf.BloomConfig, hf.BloomForCausalLM, vocab_size=VOCAB, hidden_size=32, n_layer=4, n_head=4),
    Architecture("t5", lambda tied: hf.T5ForConditionalGeneration(hf.T5Config(**_T5, tie_word_embeddings=tied)), _both_inputs, True),
    Architecture("bart", lambda tied: hf.BartForConditionalGeneration(hf.BartConfig(**_BART, tie_word_embeddings=tied)), _both_inputs, True),
    Architecture("bert", lambda tied: hf.BertForMaskedLM(hf.BertConfig(**_BERT, tie_word_embeddings=tied)), text_inputs, False),
    Architecture("vit", lambda tied: hf.ViTForImageClassification(hf.ViTConfig(**_VISION)), _pixels, False, (False,)),
    Architecture("clip", _clip, _clip_inputs, False, (False,)),
    Architecture("llava", _llava, _llava_inputs, True),
]  # fmt: skip

# Not called as often: what is special about them is tested in tests/offload/test_special_models.py.
_SPECIAL_TEXT = _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MAMBA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "state_size": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WHISPER = {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 20,
            "max_target_positions": 64, "decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def _sound() -> dict[str, torch.Tensor]:
    return {
        "input_features": torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(7)),
        "decoder_input_ids": tokens(2, 4),
    }


SPECIAL = [
    Architecture("mamba", lambda tied: hf.MambaForCausalLM(hf.MambaConfig(**_MAMBA)), lambda: {"input_ids": tokens()}, True),
    _decoder("gpt_oss", hf.GptOssConfig, hf.GptOssForCausalLM, **_MIXTRAL),
    _decoder("qwen3_moe", hf.Qwen3MoeConfig, hf.Qwen3MoeForCausalLM, **_SPECIAL_TEXT),
    Architecture("whisper", lambda tied: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**_WHISPER)), _sound, True),
]

BY_NAME = {architecture.name: architecture for architecture in (*ARCHITECTURES, *SPECIAL)}


def make(name: str, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A model whose weights are large enough to tell its layers apart, with every parameter in memory of its own."""
    torch.manual_seed(seed)
    model = BY_NAME[name].make(tied).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            # Not model.to(dtype), which would round buffers such as inv_freq too.
            parameter.data = parameter.data.to(dtype).clone()
    return model


def oracle_of(model: nn.Module) -> nn.Module:
    """The same model again, to compare with: every parameter cloned, so that it is aligned."""
    import copy

    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data = parameter.data.clone()
    return twin
