"""The keywords of `from_pretrained`, as given to `offload`: each does what it does there, or is refused by name."""

import inspect
import re
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from offload import CheckpointError, ConfigError, UnsupportedCheckpoint, offload
from offload.model.from_pretrained import HUB, MODEL, REFUSED, TAKEN
from tests.architectures import make, tokens

SMALL = {"device": "cpu", "cpu_memory": "64MiB", "batch_size": 2, "max_tokens": 32}


def keywords_of_transformers():
    """From the sources of the version that is installed; the suite runs with the oldest and the newest."""
    found = set()
    for function in (PreTrainedModel.from_pretrained, _BaseAutoModelClass.from_pretrained):
        source = inspect.getsource(function)
        found |= set(inspect.signature(function).parameters)
        found |= set(re.findall(r'kwargs\.(?:pop|get)\(\s*"(\w+)"', source))
        found |= set(re.findall(r'"(\w+)" in kwargs', source)) | set(re.findall(r'kwargs\["(\w+)"\]', source))
        for listed in re.findall(r"(?:hub_kwargs_names = |for name in )\[(.*?)\]", source, re.DOTALL):
            found |= set(re.findall(r'"(\w+)"', listed))
    return found - {"pretrained_model_name_or_path", "model_args", "kwargs", "cls"}


def test_each_keyword_stands_in_one_of_the_two_tables():
    names = keywords_of_transformers()
    assert len(names) > 40
    assert names >= {"max_memory", "offload_folder", "tp_plan", "subfolder", "variant", "offload_state_dict", "_fast_init"}
    assert not names - TAKEN - REFUSED.keys()
    assert not TAKEN & REFUSED.keys()
    assert HUB | MODEL < TAKEN


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    make("llama", True, torch.bfloat16).save_pretrained(path)
    return path


def logits_of(folder, **loading):
    with offload(folder, **SMALL, **loading) as session, torch.inference_mode():
        return session.model(tokens()).logits


def plain_logits_of(folder, **loading):
    with torch.inference_mode():
        return LlamaForCausalLM.from_pretrained(folder, **loading).eval()(tokens()).logits


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_taken_is_refused_by_name(name, folder):
    value = False if name == "use_safetensors" else "something"
    with pytest.raises(ConfigError, match=f"^{name}= of from_pretrained cannot be given: "):
        offload(folder, **SMALL, **{name: value})
    with offload(folder, **SMALL, **{name: None}):
        pass


@pytest.mark.parametrize("value", [torch.float32, "float32"])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_dtype_by_either_name(name, value, folder):
    with offload(folder, **SMALL, **{name: value}) as session:
        assert session.model.dtype == torch.float32
    assert torch.equal(logits_of(folder, **{name: value}), plain_logits_of(folder, dtype=torch.float32))


def test_dtypes_that_are_none(folder):
    assert torch.equal(logits_of(folder, torch_dtype="float32", dtype="bfloat16"), plain_logits_of(folder, dtype="bfloat16"))
    for value in ({"text_config": torch.float32}, "float33", 5, torch.int8):
        with pytest.raises(ConfigError, match="dtype="):
            offload(folder, **SMALL, torch_dtype=value).__enter__()


OVERRIDES = [
    {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10_000.0}},
    {"max_position_embeddings": 16},
    {"num_hidden_layers": 2},
    {"rms_norm_eps": 1e-2, "attn_implementation": "eager"},
]


@pytest.mark.parametrize("overrides", OVERRIDES, ids=lambda overrides: next(iter(overrides)))
def test_attributes_of_the_config_do_what_they_do_there(overrides, folder):
    found = logits_of(folder, **overrides)
    assert torch.equal(found, plain_logits_of(folder, **overrides))
    if "max_position_embeddings" not in overrides:
        assert not torch.equal(found, plain_logits_of(folder))
    with offload(folder, **SMALL, **overrides) as session:
        name, value = next(iter(overrides.items()))
        assert getattr(session.model.config, name) == value


def test_a_config_as_an_object_or_a_path(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder)
    config.rms_norm_eps = 1e-2
    config.save_pretrained(tmp_path)
    wanted = plain_logits_of(folder, config=config)
    assert torch.equal(logits_of(folder, config=config), wanted)
    assert torch.equal(logits_of(folder, config=str(tmp_path)), wanted)
    with pytest.raises(ConfigError, match="rope_theta= must be set in it"):
        offload(folder, **SMALL, config=config, rope_theta=1.0)


def test_a_subfolder_and_a_variant(folder, tmp_path):
    inner = tmp_path / "inner"
    shutil.copytree(folder, inner)
    assert torch.equal(logits_of(tmp_path, subfolder="inner"), plain_logits_of(tmp_path, subfolder="inner"))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        offload(tmp_path, **SMALL).__enter__()
    model = make("llama", True, torch.bfloat16, seed=5)
    model.save_pretrained(inner, variant="fp16")
    assert torch.equal(logits_of(inner, variant="fp16"), plain_logits_of(inner, variant="fp16"))
    assert not torch.equal(logits_of(inner, variant="fp16"), logits_of(inner))
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, variant="fp16", max_shard_size="20KB")
    assert torch.equal(logits_of(sharded, variant="fp16"), plain_logits_of(inner, variant="fp16"))
    with pytest.raises(UnsupportedCheckpoint, match=r"model\.fp8\.safetensors"):
        offload(inner, **SMALL, variant="fp8").__enter__()


def test_a_generation_config_and_a_mapping_of_keys(folder, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import GenerationConfig

    with offload(folder, **SMALL, generation_config=GenerationConfig(max_new_tokens=3, do_sample=False)) as session:
        assert session.model.generate(tokens()).shape[1] == tokens().shape[1] + 3
    shutil.copytree(folder, tmp_path / "renamed")
    file = tmp_path / "renamed" / "model.safetensors"
    save_file({name.replace("model.", "decoder.", 1): value for name, value in load_file(file).items()}, file, {"format": "pt"})
    mapping = {"^decoder": "model"}
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "renamed", key_mapping=mapping).eval()
    with torch.inference_mode():
        assert torch.equal(logits_of(tmp_path / "renamed", key_mapping=mapping), wanted(tokens()).logits)


def test_a_typo_is_answered_with_the_nearest_name(folder):
    for given, meant in (("cpu_memroy", "cpu_memory"), ("batchsize", "batch_size"), ("rope_paramters", "rope_parameters")):
        with pytest.raises(ConfigError, match=rf"{given}= \(did you mean {meant}=\?\)"):
            offload(folder, **({"device": "cpu"} | {given: "1GiB"})).__enter__()
    with pytest.raises(ConfigError, match=r"^flux_capacitor=: no option of offload"):
        offload(folder, **SMALL, flux_capacitor=1).__enter__()
    model = make("llama")
    with pytest.raises(ConfigError, match=r"gpu_memroy= \(did you mean gpu_memory=\?\)"):
        offload(model, device="cpu", gpu_memroy="1GiB")
    with pytest.raises(ConfigError, match="given by its path"):
        offload(model, device="cpu", dtype="float32")
