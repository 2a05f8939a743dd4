"""What is fetched of a repository on the hub, and adapters in the place of a model."""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from offload import CheckpointError, ConfigError, UnsupportedCheckpoint, offload
from offload.model.checkpoint_folder import find_folder, find_model
from offload.model.from_pretrained import LoadingOptions
from tests.architectures import make, tokens

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SMALL = {"device": "cpu", "cpu_memory": "64MiB", "batch_size": 2, "max_tokens": 32}


class Hub:
    """Repositories in folders, in the place of the hub; notes which files were fetched."""

    def __init__(self, root, monkeypatch):
        self.root, self.cache, self.fetched, self.asked = root / "hub", root / "cache", [], []
        monkeypatch.setattr("huggingface_hub.snapshot_download", self._snapshot)
        monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda api, name, revision=None: self._files(name))

    def repository(self, name):
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _files(self, name):
        folder = self.root / name
        if not folder.is_dir():
            raise OSError(f"404: {name}")
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def _snapshot(self, name, *, allow_patterns=None, ignore_patterns=None, **more):
        self.asked.append((name, more))
        for file in filter_repo_objects(self._files(name), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            place = self.cache / name / file
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.root / name / file, place)
                self.fetched.append(file)
        (self.cache / name).mkdir(parents=True, exist_ok=True)
        return str(self.cache / name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return Hub(tmp_path, monkeypatch)


def logits_of(name, **options):
    with offload(name, **SMALL, **options) as session, torch.inference_mode():
        return session.model(tokens()).logits


def test_only_what_the_index_names_is_fetched(hub):
    folder = hub.repository("org/model")
    model = make("llama")
    model.save_pretrained(folder, max_shard_size="20KB")
    shards = {path.name for path in folder.glob("*.safetensors")}
    assert len(shards) > 2
    others = ["consolidated.safetensors", "model.fp16.safetensors", "original/consolidated.00.pth", "original/params.json",
              "original/model.safetensors", "onnx/config.json", "checkpoint-100/model.safetensors", "pytorch_model.bin",
              "flax_model.msgpack", "tf_model.h5", "model-Q4.gguf"]  # fmt: skip
    beside = ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/tools.jinja", "code/part.py", "vocab.txt"]
    for name in (*others, *beside):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
    assert torch.equal(logits_of("org/model"), model(tokens()).logits)
    assert sorted(hub.fetched) == sorted(
        {*shards, *beside, "config.json", "generation_config.json", "model.safetensors.index.json"}
    )


def test_one_file_is_taken_as_transformers_takes_it(hub):
    folder = hub.repository("org/model")
    model = make("llama")
    model.save_pretrained(folder)
    model.save_pretrained(folder / "half", variant="fp16")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "missing.safetensors"}}')
    assert torch.equal(logits_of("org/model"), model(tokens()).logits)
    assert {name for name in hub.fetched if name.endswith("safetensors")} == {"model.safetensors"}
    hub.fetched.clear()
    assert torch.equal(logits_of("org/model", subfolder="half", variant="fp16"), model(tokens()).logits)
    assert sorted(hub.fetched) == ["half/config.json", "half/generation_config.json", "half/model.fp16.safetensors"]


def test_what_the_hub_is_asked(hub):
    make("llama").save_pretrained(hub.repository("org/model"))
    asked = {"cache_dir": "/x", "token": "t", "local_files_only": True, "force_download": True, "revision": "r"}
    logits_of("org/model", **asked)
    assert hub.asked == [("org/model", asked)] * 2


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            ["pytorch_model.bin"],
            r"org/model holds its weights as pickle files \(pytorch_model.bin\).*from_pretrained\('org/model'",
        ),
        (["a.safetensors", "b.safetensors"], "neither model.safetensors nor"),
        (["model.Q4_0.gguf"], "neither model.safetensors nor"),
    ],
)
def test_what_cannot_be_streamed_is_named_before_it_is_fetched(files, said, hub):
    folder = hub.repository("org/model")
    make("llama").config.save_pretrained(folder)
    for name in files:
        (folder / name).write_bytes(b"x")
    with pytest.raises(UnsupportedCheckpoint, match=said):
        find_folder("org/model")
    assert hub.fetched == ["config.json"]


def test_a_diffusers_pipeline_is_named(hub):
    (hub.repository("org/pipe") / "model_index.json").write_text(
        '{"_class_name": "X", "text_encoder": ["transformers", "T5"], "tokenizer": ["transformers", "T"], "unet": ["diffusers", "U"]}'
    )
    with pytest.raises(CheckpointError, match=r"org/pipe is a diffusers pipeline: give one of its models \(text_encoder\)"):
        find_folder("org/pipe")


def adapter_in(folder, base):
    """A folder with adapters, as peft writes it; what the adapted model computes."""
    torch.manual_seed(5)
    adapted = get_peft_model(make("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(folder, save_embedding_layers=False)
    with torch.inference_mode():
        return adapted.eval()(tokens()).logits


@pytest.mark.parametrize("residency", ["4MiB", "190KiB"])
def test_an_adapter_in_the_place_of_a_model_loads_its_model_too(residency, tmp_path):
    base = str(tmp_path / "base")
    make("llama").save_pretrained(base)
    expected = adapter_in(tmp_path / "adapter", base)
    with offload(tmp_path / "adapter", **SMALL | {"cpu_memory": residency}) as session, torch.inference_mode():
        assert torch.equal(session.model(tokens()).logits, expected)
        assert type(session.model).__name__ == "LlamaForCausalLM"
    with torch.inference_mode():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        assert torch.equal(plain(tokens()).logits, expected)


def test_an_adapter_on_the_hub(hub):
    make("llama").save_pretrained(hub.repository("org/base"))
    expected = adapter_in(hub.repository("me/adapter"), "org/base")
    (hub.repository("me/adapter") / "optimizer.pt").write_bytes(b"x")
    assert torch.equal(logits_of("me/adapter", revision="mine"), expected)
    assert "optimizer.pt" not in hub.fetched
    assert {more.get("revision") for name, more in hub.asked if name == "org/base"} == {None}
    assert {more.get("revision") for name, more in hub.asked if name == "me/adapter"} == {"mine"}


def test_an_adapter_whose_model_is_not_there(hub, tmp_path):
    adapter_in(tmp_path / "adapter", "org/gone")
    with pytest.raises(CheckpointError, match="holds an adapter of 'org/gone', which was not found"):
        find_model(str(tmp_path / "adapter"))
    with pytest.raises(CheckpointError, match=r"holds an adapter of org/gone: give that model"):
        find_folder(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": 3}')
    with pytest.raises(CheckpointError, match="cannot be used"):
        find_model(str(tmp_path / "adapter"))


def test_a_typo_is_answered_before_weights_are_fetched(hub):
    make("llama").save_pretrained(hub.repository("org/model"))
    with pytest.raises(ConfigError, match="rope_parameters"):
        find_folder("org/model", LoadingOptions.of({"rope_paramters": {}}))
    assert not [name for name in hub.fetched if name.endswith("safetensors")]


def test_generate_takes_an_adapter_for_the_model(tmp_path, capsys):
    from offload.cli.main import main

    model = AutoModelForCausalLM.from_pretrained(find_folder("demo"))
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(Path(find_folder("demo")))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    options = ["--prompt", "And the king", "--max-new-tokens", "8", "--device", "cpu", "--cpu-memory", "32MiB", "--quiet"]
    said = []
    for given in (["demo", "--adapter", str(tmp_path / "adapter")], [str(tmp_path / "adapter")], ["demo"]):
        assert not main(["generate", *given, *options])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert main(["generate", str(tmp_path / "adapter"), "--adapter", str(tmp_path / "adapter"), *options]) == 1
    assert "another" in capsys.readouterr().err
