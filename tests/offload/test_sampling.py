"""How the next token is chosen: what was asked for, and else what the model's generation config says."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from offload.cli.main import main
from offload.errors import CheckpointError, ConfigError
from offload.generation.prompts import Prompts
from offload.generation.sampling import Sampling, load_generation_config
from offload.generation.stop import StopFilter, before_stop
from offload.generation.text import complete
from offload.model.checkpoint_folder import find_folder

DRAWN = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def demo():
    folder = find_folder("demo")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_what_is_not_asked_for_is_as_the_model_says():
    followed = Sampling().following(DRAWN)
    assert (followed.temperature, followed.top_p, followed.top_k, followed.repetition_penalty) == (0.6, 0.9, 20, 1.1)
    assert Sampling().added_by(DRAWN) == "temperature 0.6, top_k 20, top_p 0.9, repetition_penalty 1.1"


def test_what_is_asked_for_counts():
    followed = Sampling(temperature=0.3, top_k=0, repetition_penalty=1.0).following(DRAWN)
    assert (followed.temperature, followed.top_p, followed.top_k, followed.repetition_penalty) == (0.3, 0.9, 0, 1.0)
    assert Sampling(temperature=0.0, repetition_penalty=1.0).added_by(DRAWN) == ""


def test_a_model_that_says_nothing_takes_the_likeliest_token():
    assert Sampling().following(GenerationConfig()).options() == {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "min_p": None,
        "max_new_tokens": 128,
        "repetition_penalty": 1.0,
        "num_beams": 1,
    }


def test_ways_to_draw_without_a_temperature_are_refused():
    with pytest.raises(ConfigError, match="top_k=5 says nothing at temperature 0"):
        Sampling(top_k=5).following(GenerationConfig())
    assert Sampling(top_k=5).following(DRAWN).top_k == 5


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": float("nan")}, {"min_p": 2.0}, {"num_beams": 0}, {"stop": ("",)}],
    ids=str,
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_a_broken_generation_config_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": "warm"}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load_generation_config(str(tmp_path))


@pytest.mark.parametrize(
    ("asked", "plain"),
    [
        ({"repetition_penalty": 1.3}, {"do_sample": False, "repetition_penalty": 1.3}),
        ({"num_beams": 3}, {"do_sample": False, "num_beams": 3}),
        ({"temperature": 0.8, "top_k": 7, "seed": 3}, {"do_sample": True, "temperature": 0.8, "top_k": 7}),
        ({"temperature": 0.8, "min_p": 0.2, "seed": 3}, {"do_sample": True, "temperature": 0.8, "min_p": 0.2, "top_k": 0}),
    ],
    ids=str,
)
def test_it_is_what_transformers_gives_for_it(asked, plain, demo):
    model, tokenizer = demo
    sampling = Sampling(max_new_tokens=16, **asked).following(GenerationConfig())
    (ours,) = complete(model, Prompts(tokenizer, ["And the king"]), sampling)
    torch.manual_seed(3)
    inputs = tokenizer("And the king", return_tensors="pt")
    output = model.generate(**inputs, **plain, max_new_tokens=16)
    assert ours.text == tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_an_answer_ends_before_a_stop_in_a_batch_too(demo):
    model, tokenizer = demo
    whole = [item.text for item in complete(model, Prompts(tokenizer, ["And the king", "In the beginning"]), Sampling(24), 2)]
    stop = whole[0][8:12]
    done = list(complete(model, Prompts(tokenizer, ["And the king", "In the beginning"]), Sampling(24, stop=(stop,)), 2))
    assert [item.text for item in done] == [before_stop(text, [stop]) for text in whole]
    assert done[0].new_tokens < 24


def test_what_streams_is_what_is_returned(demo):
    model, tokenizer = demo
    (whole,) = complete(model, Prompts(tokenizer, ["And the king"]), Sampling(24))
    for stop in (whole.text[6:9], whole.text[10:20], "never said"):
        pieces = []
        (item,) = complete(model, Prompts(tokenizer, ["And the king"]), Sampling(24, stop=(stop,)), on_text=pieces.append)
        assert "".join(pieces) == item.text == before_stop(whole.text, [stop])


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_a_stop_is_held_back_until_it_is_clear(size):
    text = "one two END of it; the EN then"
    for stops in (["END"], ["EN then"], ["D of", "END"], ["nothing"], ["then"]):
        out = []
        filtered = StopFilter(stops, out.append)
        for start in range(0, len(text), size):
            filtered.add(text[start : start + size], end=start + size >= len(text))
        assert "".join(out) == before_stop(text, stops)


def test_beams_are_planned_for(capsys):
    call = ["generate", "demo", "--prompt", "And the king", "--max-new-tokens", "8", "--device", "cpu", "--cpu-memory", "8MiB"]
    assert main([*call, "--num-beams", "2", "--kv-memory", "128KiB", "--exactness", "rounding", "--json"]) == 0
    paged = json.loads(capsys.readouterr().out)
    assert main([*call, "--num-beams", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["completions"] == paged["completions"]


def test_each_completion_is_a_line_as_it_comes(capsys, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"And the king"\n{"messages": [{"role": "user", "content": "Who was"}]}\n')
    call = ["generate", "demo", "--prompts", str(prompts), "--max-new-tokens", "5", "--device", "cpu", "--jsonl", "--quiet"]
    assert main(call) == 1
    assert "no chat template" in capsys.readouterr().err
    prompts.write_text('"And the king"\n{"prompt": "Who was"}\n')
    assert main(call) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["And the king", "Who was"]
    assert all(line["new_tokens"] == 5 for line in lines)


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def test_messages_and_the_system_go_through_the_template(demo):
    tokenizer = AutoTokenizer.from_pretrained(find_folder("demo"))
    tokenizer.chat_template = TEMPLATE

    def text(*arguments, **options):
        prompts = Prompts(tokenizer, *arguments, **options)
        return [tokenizer.decode(prompts.inputs([index], 0)["input_ids"][0]) for index in range(len(prompts.prompts))]

    talk = [{"role": "user", "content": "Hi"}]
    assert text([talk]) == ["<user>Hi<assistant>"]
    assert text(["Hi", talk], system="Be brief.") == ["<system>Be brief.<user>Hi<assistant>"] * 2
    assert text(["Hi", talk]) == ["Hi", "<user>Hi<assistant>"]
    assert text([[{"role": "system", "content": "No."}, *talk]], system="Be brief.") == ["<system>No.<user>Hi<assistant>"]
