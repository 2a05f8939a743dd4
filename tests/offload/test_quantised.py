"""Quantised safetensors checkpoints, streamed as they are: equal to what transformers decodes from them."""

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from offload import offload
from offload.errors import CorruptCheckpoint
from tests.fp8_files import SCALES, in_eight_bits
from tests.poison import poison_homes

TOKENS = torch.arange(3, 19).view(2, 8)
SIZES = {"vocab_size": 96, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
MAKERS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=64, tie_word_embeddings=True)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=4)),
}


def fp8_checkpoint(folder, maker, scales, without=()):
    torch.manual_seed(0)
    maker().bfloat16().save_pretrained(folder)
    in_eight_bits(folder, scales, without)
    return folder


def plainly_read(folder):
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@pytest.mark.parametrize("budget", ["2700KiB", "64MiB"])
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_fp8(architecture, scales, budget, tmp_path):
    folder = fp8_checkpoint(tmp_path, MAKERS[architecture], scales)
    plain = plainly_read(folder)
    with torch.no_grad(), offload(folder, device="cpu", cpu_memory=budget, batch_size=2, max_tokens=16) as session:
        poison_homes(session)
        assert torch.equal(session.model(TOKENS).logits, plain(TOKENS).logits)
        generated = [model.generate(TOKENS, max_new_tokens=6, do_sample=False) for model in (session.model, plain)]
        assert torch.equal(*generated)
        before = session.machine.host.reader.link.bytes_moved
        session.model(TOKENS)
        moved = session.machine.host.reader.link.bytes_moved - before
        streamed = [session.model.get_submodule(key) for key in session.plan.weights.streamed]
        numbers = sum(value.numel() for module in streamed for value in module.parameters())
        assert bool(streamed) == (budget == "2700KiB")
        assert moved <= 1.05 * numbers + TOKENS.numel() * 512
        assert not any("stored otherwise" in sentence for sentence in session.report().fallbacks)


def test_a_checkpoint_whose_weights_are_merged_is_converted_by_transformers(tmp_path):
    """Experts become one parameter while the checkpoint is loaded."""
    folder = fp8_checkpoint(tmp_path, MAKERS["mixtral"], "tiles")
    plain = plainly_read(folder)
    with torch.no_grad(), offload(folder, device="cpu", cpu_memory="5MiB", batch_size=2, max_tokens=16) as session:
        poison_homes(session)
        assert torch.equal(session.model(TOKENS).logits, plain(TOKENS).logits)
        assert any("stored otherwise" in sentence for sentence in session.report().fallbacks)


def test_scales_that_do_not_fit_are_named(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"
    fp8_checkpoint(tmp_path, MAKERS["llama"], "tiles", without=(name,))
    with pytest.raises(CorruptCheckpoint, match="is not there"), offload(tmp_path, device="cpu"):
        pass
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {name: torch.ones(5, 2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match="equal tiles"), offload(tmp_path, device="cpu"):
        pass
