"""Quantised safetensors checkpoints, streamed as they are: equal to what transformers decodes from them."""

import contextlib
import json
from functools import partial

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from offload import Training, offload
from offload.errors import CorruptCheckpoint, TrainingError, UnsupportedCheckpoint
from offload.storage.codecs.four_bits import FourBits
from tests.compiled import compiled_decoders
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


NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip
FP4 = [0, 0.0052083333, 0.6666667, 1, 0.3333333, 0.5, 0.1666667, 0.25, -0.0, -0.0052083333, -0.6666667, -1, -0.3333333, -0.5,
       -0.1666667, -0.25]  # fmt: skip


def four_bits(shape, generator, kind="nf4", nested=True):
    """As bitsandbytes stores them: blocks of 64, whose scales are in blocks of 256 where they are nested."""
    numbers, count = np.array({"nf4": NF4, "fp4": FP4}[kind], dtype=np.float32), shape[0] * shape[1]
    places = generator.integers(0, 16, count)
    stored = {"weight": torch.from_numpy((places[::2] << 4 | places[1::2]).astype(np.uint8)[:, None])}
    state = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
    scales = (generator.random(count // 64) * 0.05).astype(np.float32)
    if nested:
        known = np.sort(generator.random(256) * 2 - 1).astype(np.float32)
        eight, own = (
            generator.integers(0, 256, count // 64),
            (generator.random(-(-count // 64 // 256)) * 0.05).astype(np.float32),
        )
        offset = np.float32(0.0625)
        scales = known[eight] * np.repeat(own, 256)[: len(eight)] + offset
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
        stored |= {"weight.nested_absmax": torch.from_numpy(own), "weight.nested_quant_map": torch.from_numpy(known)}
    stored["weight.absmax"] = torch.from_numpy(eight.astype(np.uint8) if nested else scales)
    stored["weight.quant_map"] = torch.from_numpy(numbers)
    said = np.frombuffer(json.dumps(state).encode(), dtype=np.uint8)
    stored[f"weight.quant_state.bitsandbytes__{kind}"] = torch.from_numpy(said.copy())
    values = numbers[places].reshape(shape) * np.repeat(scales, 64).reshape(shape)
    return stored, values, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}


def row_maxima(shape, generator):
    numbers, maxima = generator.integers(-127, 128, shape), (generator.random(shape[0]) * 0.2).astype(np.float32)
    stored = {"weight": torch.from_numpy(numbers.astype(np.int8)), "SCB": torch.from_numpy(maxima)}
    stored["weight_format"] = torch.tensor(0, dtype=torch.uint8)
    values = numbers.astype(np.float32) * maxima[:, None] * np.float32(7.874015718698502e-3)
    return stored, values, {"quant_method": "bitsandbytes", "load_in_8bit": True}


FORMATS = {
    "nf4": four_bits,
    "nf4 plain scales": partial(four_bits, nested=False),
    "fp4": partial(four_bits, kind="fp4"),
    "bitsandbytes int8": row_maxima,
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


@pytest.mark.parametrize("decoder", ["torch", "native"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(64, 192), (33, 70)])
def test_what_bitsandbytes_itself_makes_of_them(shape, nested, kind, decoder):
    """Packed by it, and unpacked by it."""
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = torch.randn(shape)
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
    stored = state.as_dict(packed=True)
    said = json.loads(bytes(stored.pop(f"quant_state.bitsandbytes__{kind}").tolist()))
    names = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if nested else [])]
    parts = [part.contiguous().view(torch.uint8).view(-1) for part in (packed, *(stored[name] for name in names))]
    codec = FourBits(kind, 64, said.get("nested_blocksize", 0), said.get("nested_offset", 0.0))
    out = torch.empty(shape)
    with compiled_decoders() if decoder == "native" else contextlib.nullcontext():
        codec.decode(parts, out)
    assert torch.equal(out, functional.dequantize_4bit(packed, state))


def test_a_state_that_is_no_json_is_named(tmp_path):
    folder, _ = integer_checkpoint(tmp_path, MAKERS["llama"], four_bits)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "quant_state" in name)
    whole = tensors[name]
    changes = {"is no JSON object": whole[:-3], "sizes of blocks": whole.clone(), "they do not fit": whole.clone()}
    for old, new, said in ((b"64", b"-1", "sizes of blocks"), (b"64", b"32", "they do not fit")):
        text = bytes(whole.tolist()).replace(old, new, 1)
        changes[said] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    for said, state in changes.items():
        save_file(tensors | {name: state.contiguous()}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CorruptCheckpoint, match=said), offload(folder, device="cpu"):
            pass


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


@pytest.mark.parametrize("form", [gptq, awq, compressed, four_bits, row_maxima])
def test_parts_that_do_not_fit_are_named(form, tmp_path):
    folder, _ = integer_checkpoint(tmp_path, MAKERS["llama"], form)
    tensors = load_file(folder / "model.safetensors")
    part = next(name for name in tensors if name.endswith(("qweight", "weight_packed", "proj.weight")))
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
