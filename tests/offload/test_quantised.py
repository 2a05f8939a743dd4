"""Quantised safetensors checkpoints, streamed as they are: equal to what transformers decodes from them."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from offload import Training, offload
from offload.errors import CorruptCheckpoint, TrainingError, UnsupportedCheckpoint
from tests.fp8_files import SCALES, in_eight_bits
from tests.poison import moved_in_a_pass, poison_homes

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
def test_fp8(architecture, scales, budget, tmp_path, decoders):
    folder = fp8_checkpoint(tmp_path, MAKERS[architecture], scales)
    plain = plainly_read(folder)
    with torch.no_grad(), offload(folder, device="cpu", cpu_memory=budget, batch_size=2, max_tokens=16) as session:
        poison_homes(session)
        assert torch.equal(session.model(TOKENS).logits, plain(TOKENS).logits)
        generated = [model.generate(TOKENS, max_new_tokens=6, do_sample=False) for model in (session.model, plain)]
        assert torch.equal(*generated)
        moved = moved_in_a_pass(session, TOKENS)
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


def packed(numbers, bits, along_rows=False):
    """Words of 32 bits, written from the formats' texts: the first number in the lowest bits."""
    numbers = numbers.T if along_rows else numbers
    count = 32 // bits
    padded = np.pad(numbers.astype(np.uint32), ((0, 0), (0, -numbers.shape[1] % count)))
    words = np.zeros((len(padded), padded.shape[1] // count), dtype=np.uint32)
    for place in range(count):
        words |= padded[:, place::count] << np.uint32(bits * place)
    words = words.T if along_rows else words
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32))


def gptq(shape, generator, bits=4, size=64, order=False, version="gptq"):
    """A weight as GPTQ stores it, what it stands for, and what the config says of it."""
    outputs, inputs = shape
    numbers = generator.integers(0, 1 << bits, (inputs, outputs))
    zeros = generator.integers(1, 1 << bits, (inputs // size, outputs))
    scales = (generator.random((inputs // size, outputs)) * 0.01).astype(np.float16)
    group_of = np.arange(inputs) // size
    if order:
        generator.shuffle(group_of)
    stored = {"qweight": packed(numbers, bits, along_rows=True), "qzeros": packed(zeros - (version == "gptq"), bits),
              "scales": torch.from_numpy(scales), "g_idx": torch.from_numpy(group_of.astype(np.int32))}  # fmt: skip
    values = (numbers - zeros[group_of]) * scales[group_of].astype(np.float64)
    return (
        stored,
        values.T,
        {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": order, "checkpoint_format": version},
    )


def awq(shape, generator, size=64):
    outputs, inputs = shape
    numbers, zeros = generator.integers(0, 16, (inputs, outputs)), generator.integers(0, 16, (inputs // size, outputs))
    scales = (generator.random((inputs // size, outputs)) * 0.01).astype(np.float16)
    order = [column + place for column in range(0, outputs, 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
    stored = {"qweight": packed(numbers[:, order], 4), "qzeros": packed(zeros[:, order], 4), "scales": torch.from_numpy(scales)}
    group_of = np.arange(inputs) // size
    values = (numbers - zeros[group_of]) * scales[group_of].astype(np.float64)
    return stored, values.T, {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}


def compressed(shape, generator, bits=4, size=64, symmetric=True):
    """`pack-quantized`; a size of -1 for a scale a row."""
    groups = 1 if size < 0 else shape[1] // size
    numbers = generator.integers(0, 1 << bits, shape)
    scales = torch.from_numpy(generator.random((shape[0], groups)) * 0.01).bfloat16()
    zeros = np.full((shape[0], groups), 1 << (bits - 1)) if symmetric else generator.integers(0, 1 << bits, (shape[0], groups))
    stored = {"weight_packed": packed(numbers, bits), "weight_scale": scales, "weight_shape": torch.tensor(shape)}
    if not symmetric:
        stored["weight_zero_point"] = packed(zeros, bits, along_rows=True)
    spread = (np.repeat(item, shape[1] // groups, 1) for item in (zeros, scales.double().numpy()))
    zeros_of, scales_of = spread
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "group_size": size,
        "strategy": "group" if size > 0 else "channel",
    }
    method = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
    }
    return stored, (numbers - zeros_of) * scales_of, method


def in_integers(shape, generator):
    numbers = generator.integers(-128, 128, shape)
    scales = torch.from_numpy(generator.random((shape[0], 1)) * 0.001).bfloat16()
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    method = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
    }
    return (
        {"weight": torch.from_numpy(numbers.astype(np.int8)), "weight_scale": scales},
        numbers * scales.double().numpy(),
        method,
    )


FORMATS = {
    "gptq": gptq,
    "gptq desc_act": partial(gptq, order=True),
    "gptq v2": partial(gptq, version="gptq_v2"),
    "gptq 8 bits": partial(gptq, bits=8, size=128),
    "awq": awq,
    "compressed-tensors": compressed,
    "compressed-tensors 8 bits": partial(compressed, bits=8, size=-1),
    "compressed-tensors asymmetric": partial(compressed, symmetric=False),
    "compressed-tensors int8": in_integers,
}


def integer_checkpoint(folder, maker, form):
    """A saved model whose products' weights are stored so; the plain model with what they stand for."""
    torch.manual_seed(0)
    generator, method = np.random.default_rng(0), {}
    in_half = form in (awq, gptq) or getattr(form, "func", None) is gptq
    maker().to(torch.float16 if in_half else torch.bfloat16).save_pretrained(folder)
    model = plainly_read(folder)
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if value.dim() < 2 or "proj" not in name:
            tensors[name] = value
            continue
        stored, values, method = form(tuple(value.shape), generator)
        path = name.removesuffix(".weight")
        tensors |= {f"{path}.{part}": content.contiguous() for part, content in stored.items()}
        with torch.no_grad():
            model.get_submodule(path).weight.copy_(torch.from_numpy(values))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": method}))
    return folder, model


@pytest.mark.parametrize("budget", ["2300KiB", "64MiB"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("form", FORMATS)
def test_integers(form, architecture, budget, tmp_path, decoders):
    folder, plain = integer_checkpoint(tmp_path, MAKERS[architecture], FORMATS[form])
    with torch.no_grad(), offload(folder, device="cpu", cpu_memory=budget, batch_size=2, max_tokens=16) as session:
        poison_homes(session)
        assert torch.equal(session.model(TOKENS).logits, plain(TOKENS).logits)
        moved = moved_in_a_pass(session, TOKENS)
        streamed = [session.model.get_submodule(key) for key in session.plan.weights.streamed]
        numbers = sum(value.numel() for module in streamed for value in module.parameters())
        assert bool(streamed) == (budget == "2300KiB")
        assert moved <= (1.1 if "8" in form else 0.65) * numbers + TOKENS.numel() * 512
    # The others' homes are poisoned.
    for name, value in session.model.state_dict().items():
        assert "proj" not in name or torch.equal(value, plain.state_dict()[name]), name


def test_what_compressed_tensors_itself_makes_of_them(tmp_path):
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    from compressed_tensors.quantization import QuantizationScheme

    for form in (compressed, partial(compressed, symmetric=False), partial(compressed, bits=8, size=-1)):
        stored, values, method = form((256, 384), np.random.default_rng(1))
        scheme = QuantizationScheme.model_validate(method["config_groups"]["group_0"])
        theirs = base.PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
        assert torch.equal(theirs, torch.from_numpy(values).bfloat16())


@pytest.mark.parametrize(
    ("form", "changed", "said"),
    [
        (gptq, {"bits": 3}, "GPTQ with 3 bits"),
        (gptq, {"checkpoint_format": "marlin"}, "format marlin"),
        (compressed, {"format": "nvfp4-pack-quantized"}, "format nvfp4"),
        (awq, {"version": "gemv"}, "layout gemv"),
        (compressed, {"config_groups": {"group_0": {"weights": {"num_bits": 3}}}}, r"weights of \[3\] bits"),
    ],
)
def test_other_layouts_are_named(form, changed, said, tmp_path):
    folder, _ = integer_checkpoint(tmp_path, MAKERS["llama"], form)
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] |= changed
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedCheckpoint, match=said), offload(folder, device="cpu"):
        pass


@pytest.mark.parametrize("form", [gptq, awq, compressed])
def test_parts_that_do_not_fit_are_named(form, tmp_path):
    folder, _ = integer_checkpoint(tmp_path, MAKERS["llama"], form)
    tensors = load_file(folder / "model.safetensors")
    part = next(name for name in tensors if name.endswith(("qweight", "weight_packed")))
    save_file(tensors | {part: tensors[part][:-8].contiguous()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match="they do not fit"), offload(folder, device="cpu"):
        pass


def test_what_the_folder_says_of_generating_counts(tmp_path):
    folder, _ = integer_checkpoint(tmp_path, MAKERS["llama"], gptq)
    hf.GenerationConfig(eos_token_id=[7, 9], pad_token_id=3, temperature=0.5, do_sample=True).save_pretrained(folder)
    with offload(folder, device="cpu", cpu_memory="64MiB", max_tokens=16) as session:
        assert session.model.generation_config.eos_token_id == [7, 9]
        assert session.model.generation_config.temperature == 0.5


def test_what_is_quantised_is_not_trained_itself(tmp_path):
    folder, _ = integer_checkpoint(tmp_path, MAKERS["llama"], compressed)
    options = {"device": "cpu", "cpu_memory": "128MiB", "batch_size": 2, "max_tokens": 16}
    with offload(folder, training=Training(), **options) as session:
        with pytest.raises(TrainingError, match="freeze it"):
            session.backward([lambda: session.model(TOKENS, labels=TOKENS).loss])
        with pytest.raises(TrainingError, match="freeze it"):
            session.model(TOKENS, labels=TOKENS)
