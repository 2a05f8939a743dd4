"""The same model for llama.cpp: its weights as a GGUF, run by the `xllamacpp` wheel.

Neither `xllamacpp` nor `gguf` is a dependency: `pip install --no-deps --target FOLDER xllamacpp gguf`, then
`--llama-cpp FOLDER`.
Imports nothing of ours, like everything that runs in a measured process.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def to_gguf(folder: str, target: str, packages: str, kind: str = "BF16") -> None:
    """Write the weights of a llama checkpoint as GGUF: norms in fp32, as llama.cpp's own converter does.

    Args:
        kind: ggml's type of the products' weights.
    """
    sys.path.insert(0, packages)
    import gguf
    from safetensors import safe_open

    config = json.loads(Path(folder, "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_parameters", config).get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{index}>" for index in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                value = _permuted(name, file.get_tensor(name), heads, kv_heads)
                if value.dim() == 1:
                    writer.add_tensor(_renamed(name), value.float().numpy())
                else:
                    stored = gguf.GGMLQuantizationType[kind]
                    writer.add_tensor(_renamed(name), gguf.quants.quantize(value.float().numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def token_moments(model: str, packages: str, prompt: int, tokens: int) -> list[float]:
    """When each token was there."""
    sys.path.insert(0, packages)
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = prompt + tokens + 8
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    # As `llama-cli --no-warmup`: a pass that makes nothing would be counted.
    params.warmup = False
    params.verbosity = -1
    server = xllamacpp.Server(params)
    moments: list[float] = []

    def stamp(chunk: Any) -> bool:
        if isinstance(chunk, dict) and chunk["choices"][0]["finish_reason"] is None:
            moments.append(time.perf_counter())
        return False

    ids = [3 + index % 900 for index in range(prompt)]
    asked = {"prompt": ids, "n_predict": tokens, "temperature": 0.0, "ignore_eos": True, "stream": True, "cache_prompt": False}
    server.handle_completions(asked, stamp)
    return moments


def _renamed(name: str) -> str:
    stem = name.removesuffix(".weight")
    parts = stem.split(".")
    if parts[:2] == ["model", "layers"]:
        return f"blk.{parts[2]}.{_NAMES['.'.join(parts[3:])]}.weight"
    return f"{_NAMES[stem]}.weight"


def _permuted(name: str, value: Any, heads: int, kv_heads: int) -> Any:
    """Rows of queries and keys in the order in which llama.cpp turns them by their positions."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return value
    groups = heads if name.endswith("q_proj.weight") else kv_heads
    rows, width = value.shape
    return value.reshape(groups, 2, rows // groups // 2, width).swapaxes(1, 2).reshape(rows, width)
