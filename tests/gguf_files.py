"""GGUF files of small models, as llama.cpp's converter would write them, and transformers' own reading of them."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers as hf
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from offload.model.checkpoint_folder import find_folder
from offload.storage.gguf_header import GGML_TYPES

SIZES = {name: (numbers, nbytes) for name, numbers, nbytes in GGML_TYPES.values()}
"""Numbers and bytes of a block of each type."""

_NEAR_ONE = np.frombuffer(np.float16(0.01).tobytes(), dtype=np.uint8)
_SCALES_AT = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
              "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)}  # fmt: skip


def blocks(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """Random blocks of a type, [count, bytes], with scales that make numbers of weights' size."""
    data = np.random.default_rng(seed).integers(0, 256, (count, SIZES[kind][1]), dtype=np.uint8)
    for place in _SCALES_AT.get(kind, ()):
        data[:, place : place + 2] = _NEAR_ONE
    if kind == "MXFP4":
        data[:, 0] = 120
    return data


def config_of(architecture: str, tied: bool) -> hf.PreTrainedConfig:
    """A small model: as wide as one block of the largest types."""
    sizes = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
             "tie_word_embeddings": tied, "rms_norm_eps": 1e-6}  # fmt: skip
    if architecture == "qwen3":
        # transformers' table for it knows no other width of a head.
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
    return {"llama": hf.LlamaConfig, "qwen3": hf.Qwen3Config, "gemma2": hf.Gemma2Config}[architecture](**sizes)


def write_gguf(
    path: Path, architecture: str, kinds: list[str], tied: bool = True, more: tuple[str, ...] = (), part_tensors: int = 0
) -> str:
    """A file whose matrices have the given types, one after another; norms are F32, and so are `more` tensors of four.

    Args:
        part_tensors: the file is split into parts of so many.
    """
    config = config_of(architecture, tied)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=part_tensors)
    writer.add_context_length(256)
    writer.add_embedding_length(256)
    writer.add_block_count(3)
    writer.add_feed_forward_length(512)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(2048)
    _add_tokenizer(writer)
    with torch.device("meta"):
        outline = hf.AutoModelForCausalLM.from_config(config)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, 3)
    seen, generator = set(), np.random.default_rng(1)
    for index, (name, value) in enumerate(outline.state_dict().items()):
        stem, _, suffix = name.rpartition(".")
        stored = f"{names.get_name(stem)}.{suffix}"
        if stored in seen or (tied and name.startswith("lm_head")):
            continue
        seen.add(stored)
        if value.dim() == 1:
            writer.add_tensor(stored, generator.normal(1.0, 0.1, tuple(value.shape)).astype(np.float32))
            continue
        kind = kinds[index % len(kinds)]
        if kind in ("F32", "F16", "BF16"):
            values = generator.normal(0.0, 0.05, tuple(value.shape)).astype(np.float32)
            data = quants.quantize(values, Kind[kind])
        else:
            data = blocks(kind, value.numel() // SIZES[kind][0], index).reshape(value.shape[0], -1)
        writer.add_tensor(stored, data, raw_dtype=Kind[kind])
    for name in more:
        writer.add_tensor(name, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """The demo's."""
    model = json.loads(Path(find_folder("demo"), "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    # Gemma's tokenizer wants scores, in older transformers.
    writer.add_token_scores([float(-number) for number in range(len(tokens))])
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges([item if isinstance(item, str) else " ".join(item) for item in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)


def plainly_read(path: str, architecture: str, dtype: torch.dtype, tied: bool = True) -> torch.nn.Module:
    """The model with all weights decoded by transformers and `gguf`, in memory of its own."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    torch.manual_seed(0)
    config = hf.AutoConfig.from_pretrained(str(Path(path).parent), gguf_file=Path(path).name)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    read = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model, torch_dtype=dtype)["tensors"]
    left = model.load_state_dict(read, strict=False)
    assert not left.unexpected_keys
    assert set(left.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model
