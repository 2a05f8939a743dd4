"""`generate` and `plan` are for models that write text after a prompt; others are told the Python way."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from offload.cli.main import main
from offload.model.checkpoint_folder import find_folder
from tests.architectures import BY_NAME


@pytest.fixture
def saved(tmp_path):
    """A function that saves the architecture of this name, with the demo's tokenizer."""

    def save(name):
        BY_NAME[name].make(False).save_pretrained(tmp_path)
        for path in Path(find_folder("demo")).glob("token*"):
            shutil.copy(path, tmp_path)
        return str(tmp_path)

    return save


@pytest.mark.parametrize(
    ("name", "why"),
    [("bert", "does not write text"), ("vit", "takes pixel_values"), ("whisper", "takes input_features")],
)
def test_what_takes_no_prompt_is_told_the_python_way(name, why, saved, capsys):
    folder = saved(name)
    for call in (["generate", folder, "--prompt", "a"], ["plan", folder]):
        assert main([*call, "--device", "cpu"]) == 1
        error = capsys.readouterr().err
        assert why in error
        assert "session.model(**inputs)" in error


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_with_an_encoder_gives_its_whole_answer(name, saved, capsys):
    folder = saved(name)
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    # Ids within these models' small vocabulary.
    prompt = tokenizer.decode([5, 9, 17, 30, 41, 12])
    inputs = {"input_ids": tokenizer(prompt, return_tensors="pt")["input_ids"].clamp(max=95)}
    assert inputs["input_ids"].shape[1] > 3
    expected = tokenizer.decode(model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, 1:], skip_special_tokens=True)
    call = ["generate", folder, "--prompt", prompt, "--max-new-tokens", "6", "--device", "cpu", "--temperature", "0"]
    assert main([*call, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["completions"][0]["text"] == expected
    assert main([*call, "--quiet"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == expected.rstrip("\n")
