"""The `finetune` command, and the data that it reads."""

import errno
import json
import os
import sys
import types

import pytest
import torch
from transformers import AutoTokenizer

from offload import ConfigError, Training, TrainingError, offload
from offload.cli.main import main
from offload.finetune import loop
from offload.finetune.data import IGNORED, Batches, Example, check_packing, packed, read_examples
from offload.finetune.loop import train
from offload.finetune.recipe import Recipe
from offload.model.checkpoint_folder import find_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

SENTENCE = "And the king of the sea said unto the whale, Sing."


def run(capsys, *arguments):
    status = main(list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(find_folder("demo"))


def written(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_it_learns_and_what_it_learned_is_used(capsys, tmp_path):
    data = written(tmp_path, *[{"prompt": "And the king", "completion": SENTENCE.removeprefix("And the king")}] * 4)
    folder = str(tmp_path / "adapter")
    arguments = ["--data", data, "--device", "cpu", "--cpu-memory", "12MiB", "--epochs", "20", "--learning-rate", "5e-3"]
    status, _, err = run(capsys, "finetune", "demo", *arguments, "--output", folder, "--rank", "8", "--warmup", "2")
    assert status == 0, err
    assert "step 80:" in err
    assert "streamed from disk" in err
    assert "backward" in err
    generate = ["generate", "demo", "--prompt", "And the king", "--max-new-tokens", "16", "--device", "cpu", "--quiet"]
    before = run(capsys, *generate)[1]
    after = run(capsys, *generate, "--adapter", folder, "--cpu-memory", "12MiB")[1]
    assert SENTENCE.removeprefix("And the king").strip() in after
    assert SENTENCE.removeprefix("And the king").strip() not in before
    assert run(capsys, "finetune", "demo", *arguments, "--output", folder)[0] != 0


def test_the_same_seed_gives_the_same_adapter(capsys, tmp_path):
    data = written(tmp_path, *[{"text": f"{SENTENCE} {number}"} for number in range(6)])
    weights = []
    for name, budget in (("a", "12MiB"), ("b", "64MiB")):
        arguments = ["--data", data, "--device", "cpu", "--cpu-memory", budget, "--dropout", "0.1", "--seed", "5"]
        more = ["--batch-size", "2", "--gradient-accumulation", "2", "--quiet", "--output", str(tmp_path / name)]
        assert run(capsys, "finetune", "demo", *arguments, *more)[0] == 0
        weights.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_the_loss_counts_what_is_to_be_said(tokenizer, tmp_path):
    path = written(tmp_path, {"prompt": "And the", "completion": " king"}, {"text": "In the beginning"})
    asked, text = read_examples(path, tokenizer, 64)
    prompt = tokenizer("And the")["input_ids"]
    assert asked.ids[: len(prompt)] == tuple(prompt)
    assert asked.labels[: len(prompt)] == (IGNORED,) * len(prompt)
    assert asked.labels[len(prompt) :] == asked.ids[len(prompt) :]
    assert asked.ids[-1] == tokenizer.eos_token_id
    assert text.labels == text.ids


def test_of_messages_the_assistants_are_learned(tokenizer, tmp_path):
    import copy

    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The king."}] * 2
    (example,) = read_examples(written(tmp_path, {"messages": talk}), chatting, 256)
    learned = [token for token, label in zip(example.ids, example.labels, strict=True) if label != IGNORED]
    assert chatting.decode(learned).count("The king.") == 2
    assert "Who" not in chatting.decode(learned)
    assert chatting.decode(list(example.ids)) == chatting.apply_chat_template(talk, tokenize=False)


def test_long_text_is_cut_and_short_batches_are_padded(tokenizer, tmp_path):
    examples = read_examples(written(tmp_path, {"text": "And the king said. " * 40}), tokenizer, 32)
    assert len(examples) > 3
    assert max(len(example.ids) for example in examples) == 32
    batches = Batches(examples, 2, seed=1, padding_id=0)
    seen = [row for batch in batches.epoch(0) for row in batch["input_ids"].tolist()]
    assert len(seen) == len(examples)
    assert seen != [row for batch in batches.epoch(1) for row in batch["input_ids"].tolist()]
    for batch in batches.epoch(0):
        assert torch.equal(batch["labels"] == IGNORED, batch["attention_mask"] == 0)


BAD_LINES = {
    "{": "line 2 is not JSON",
    "[1]": "line 2 is not an object",
    '{"colour": 1}': "line 2 has neither",
    '{"messages": [{"role": "user"}]}': "no chat template",
    '{"prompt": "a", "completion": "%s"}' % ("and the king said " * 100): "--sequence-length is 64",
}


@pytest.mark.parametrize("line", list(BAD_LINES), ids=list(BAD_LINES.values()))
def test_a_bad_line_is_named(line, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=BAD_LINES[line]):
        read_examples(written(tmp_path, {"text": "and the king"}, line), tokenizer, 64)


def test_bad_requests(capsys, tmp_path):
    data = written(tmp_path, {"text": "and the king"})
    output = str(tmp_path / "out")
    for arguments, sentence in (
        (["--data", data, "--output", str(tmp_path)], "exists already"),
        (["--data", str(tmp_path / "none"), "--output", output], "cannot be read"),
        (["--data", data, "--output", output, "--rank", "0"], "--rank 0"),
        (["--data", data, "--output", output, "--learning-rate", "nan"], "--learning-rate nan"),
        (["--data", data, "--output", output, "--target-modules", "nothing_like_it"], "cannot be adapted"),
    ):
        status, _, err = run(capsys, "finetune", "demo", "--device", "cpu", *arguments)
        assert status == 1, err
        assert sentence in err
    assert (
        "holds no adapter" in run(capsys, "generate", "demo", "--prompt", "a", "--device", "cpu", "--adapter", str(tmp_path))[2]
    )


def test_a_loss_that_is_no_number_stops_before_the_step():
    with offload("demo", device="cpu", cpu_memory="64MiB", training=Training(), max_tokens=16) as session:
        weight = session.model.model.norm.weight
        session.model.requires_grad_(False)
        weight.requires_grad_()
        before = weight.detach().clone()
        with torch.no_grad():
            session.model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
        ids = tuple(range(3, 12))
        batches = Batches([Example(ids, ids, 1)], 1, 0, 0)
        with pytest.raises(TrainingError, match="step 1"):
            train(session, session.model, batches, Recipe())
        assert torch.equal(weight, before)
        with pytest.raises(ConfigError, match="nothing is to be trained"):
            train(session, session.model.requires_grad_(False), batches, Recipe())


def test_all_weights_are_trained_saved_and_merged(capsys, tmp_path):
    data = written(tmp_path, *[{"prompt": "And the king", "completion": SENTENCE.removeprefix("And the king")}] * 4)
    common = ["--data", data, "--device", "cpu", "--epochs", "6", "--gradient-accumulation", "2", "--eval-data", data]
    full = ["--method", "full", "--state-tier", "nvme", "--cpu-memory", "80MiB", "--learning-rate", "1e-3", "--eval-every", "4"]
    page = tmp_path / "run.html"
    status, _, err = run(capsys, "finetune", "demo", *common, *full, "--output", str(tmp_path / "full"), "--report", str(page))
    assert status == 0, err
    assert "written to the SSD in each step: 76" in err
    assert err.count("evaluation") >= 3
    assert "What was learned" in page.read_text()
    assert not (tmp_path / "full" / "checkpoint").exists()
    generate = ["--prompt", "And the king", "--max-new-tokens", "12", "--device", "cpu", "--quiet"]
    said = run(capsys, "generate", str(tmp_path / "full"), *generate)[1]
    assert "of the sea said unto the whale" in said
    adapter, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    assert run(capsys, "finetune", "demo", *common, "--learning-rate", "5e-3", "--quiet", "--output", adapter)[0] == 0
    assert run(capsys, "merge", "demo", "--adapter", adapter, "--output", merged)[0] == 0
    assert "of the sea said unto the whale" in run(capsys, "generate", merged, *generate)[1]
    assert run(capsys, "merge", "demo", "--adapter", adapter, "--output", merged)[0] == 1


def test_a_merged_model_is_pefts_own(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from offload.adapters.peft import merge

    def adapted():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(find_folder("demo"))
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))

    ours, theirs = merge(adapted(), str(tmp_path)), adapted().merge_and_unload()
    wanted = theirs.state_dict()
    assert ours.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in ours.state_dict().items())


def test_packed_texts_do_not_see_each_other(tokenizer, tmp_path):
    lines = [{"text": f"{SENTENCE} {number}"} for number in range(5)]
    examples = read_examples(written(tmp_path, *lines), tokenizer, 64)
    rows = packed(examples, 64)
    assert len(rows) < len(examples)
    assert max(len(row.ids) for row in rows) <= 64
    assert sorted(token for row in rows for token in row.ids) == sorted(token for example in examples for token in example.ids)
    batches = Batches(rows, 1, 0, 0)
    with offload("demo", device="cpu", cpu_memory="64MiB", max_tokens=64) as session:
        check_packing(session.model, batches)
        total, counted = 0.0, 0
        with torch.no_grad():
            for batch in batches.in_order():
                tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
                total += float(session.model(**batch, use_cache=False).loss) * tokens
                counted += tokens
            alone = sum(
                float(session.model(**batch, use_cache=False).loss) * (len(batch["labels"][0]) - 1)
                for batch in Batches(examples, 1).in_order()
            )
        assert counted == sum(len(example.ids) - 1 for example in examples)
        assert total == pytest.approx(alone, rel=1e-3)


class Mixes(torch.nn.Module):
    """Looks at all that came before, whatever its position."""

    def forward(self, input_ids, position_ids=None, use_cache=None):
        from types import SimpleNamespace

        return SimpleNamespace(logits=input_ids.cumsum(1)[..., None].float())


def test_a_model_that_mixes_packed_texts_is_refused():
    row = Example(tuple(range(3, 13)), tuple(range(3, 13)), 1, (0, 1, 2, 3, 4, 0, 1, 2, 3, 4))
    with pytest.raises(ConfigError, match="mixes the texts"):
        check_packing(Mixes(), Batches([row], 1))


def test_a_folder_and_the_hub(tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "texts"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"without \.jsonl"):
        read_examples(folder, tokenizer, 64)
    (folder / "a.txt").write_text(SENTENCE)
    (folder / "b.jsonl").write_text(json.dumps({"text": SENTENCE}) + "\n\n" + json.dumps({"text": "x y"}))
    found = read_examples(folder, tokenizer, 64)
    assert [example.line for example in found] == [1, 1, 3]
    assert found[0].ids == found[1].ids
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        read_examples("someone/something", tokenizer, 64)
    rows = types.SimpleNamespace(load_dataset=lambda name, split: [{"text": SENTENCE}, {"colour": 1}])
    monkeypatch.setitem(sys.modules, "datasets", rows)
    with pytest.raises(ConfigError, match="someone/something, row 2 has neither"):
        read_examples("someone/something", tokenizer, 64)


def test_training_is_resumed_and_other_settings_are_refused(capsys, tmp_path):
    data = written(tmp_path, *[{"text": f"{SENTENCE} {number}"} for number in range(6)])
    folder = tmp_path / "out"
    arguments = ["finetune", "demo", "--data", data, "--device", "cpu", "--output", str(folder), "--save-every", "2", "--quiet"]
    assert run(capsys, *arguments, "--max-steps", "3")[0] == 0
    # The adapter is written: what is left to be resumed is its checkpoint.
    for file in folder.iterdir():
        if file.is_file():
            file.unlink()
    assert "--resume" in run(capsys, *arguments)[2]
    status, _, err = run(capsys, *arguments, "--resume", "--alpha", "3")
    assert status == 1
    assert "alpha was 32.0 and is 3.0" in err
    other = written(tmp_path, {"text": SENTENCE})
    assert "settings or data" in run(capsys, *arguments, "--resume", "--data", other)[2]
    assert run(capsys, *arguments, "--resume")[0] == 1
    data = written(tmp_path, *[{"text": f"{SENTENCE} {number}"} for number in range(6)])
    assert run(capsys, *arguments, "--resume", "--max-steps", "5")[0] == 0
    whole = tmp_path / "whole"
    arguments[arguments.index(str(folder))] = str(whole)
    assert run(capsys, *arguments, "--max-steps", "5")[0] == 0
    assert (folder / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_a_full_disk_leaves_the_last_checkpoint(capsys, tmp_path, monkeypatch):
    data = written(tmp_path, *[{"text": f"{SENTENCE} {number}"} for number in range(6)])
    folder = tmp_path / "out"
    real, calls = os.posix_fallocate, []

    def full(descriptor, offset, nbytes):
        calls.append(nbytes)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor, offset, nbytes)

    arguments = ["finetune", "demo", "--data", data, "--device", "cpu", "--output", str(folder), "--save-every", "2", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        status, _, err = run(capsys, *arguments)
    assert status == 1
    assert "free some space" in err
    manifest = json.loads((folder / "checkpoint" / "training.json").read_text())
    assert manifest["progress"]["step"] == 2
    assert run(capsys, *arguments, "--resume")[0] == 0


def test_what_cannot_be_learned_from_stops_with_the_last_good_state(capsys, tmp_path):
    data = written(tmp_path, *[{"text": f"{SENTENCE} {number}"} for number in range(6)])
    folder = tmp_path / "out"
    arguments = ["finetune", "demo", "--data", data, "--device", "cpu", "--output", str(folder), "--quiet", "--method", "full"]
    status, _, err = run(capsys, *arguments, "--learning-rate", "1e38", "--optimizer", "sgd", "--epochs", "9")
    assert status == 1
    assert "smaller learning rate" in err
    manifest = json.loads((folder / "checkpoint" / "training.json").read_text())
    assert manifest["progress"]["step"] >= 1


SEPARATORS = "a\u2028b c\u2029d e\x85f g\vh i\fj k\x1cl m\x1en"


def test_only_a_line_feed_ends_a_line(tokenizer, tmp_path):
    """What Unicode calls a line's end stands in strings as it is; a byte-order mark and Windows' line ends are taken."""
    raw = "\ufeff" + f'{{"text": "{SEPARATORS}"}}\r\n' * 2 + " \t\r\n"
    path = tmp_path / "data.jsonl"
    path.write_bytes(raw.encode())
    found = read_examples(path, tokenizer, 512)
    assert len(found) == 2
    assert [example.line for example in found] == [1, 2]
    assert found[0].ids[:-1] == tuple(tokenizer(SEPARATORS)["input_ids"])
    path.write_bytes(b'{"text": "ok"}\n\xff\n')
    with pytest.raises(ConfigError, match=r"is not UTF-8 text: byte 15 is 0xff"):
        read_examples(path, tokenizer, 512)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_bytes("\ufeffIn the beginning\u2028was the word\r\n".encode())
    (example,) = read_examples(folder, tokenizer, 512)
    assert example.ids[:-1] == tuple(tokenizer("In the beginning\u2028was the word\n")["input_ids"])


def test_what_is_empty_hides_nothing(tokenizer, tmp_path):
    import copy

    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The king."}]
    asked = {"prompt": "Who?", "completion": " The king."}

    def ids(item):
        return [example.ids for example in read_examples(written(tmp_path, item, {"text": "And so"}), chatting, 256)[:-1]]

    assert ids({"text": "", "messages": talk}) == ids({"messages": talk}) == ids({"text": None, "messages": talk})
    assert ids({"text": "", "prompt": "", "completion": "", "messages": talk}) == ids({"messages": talk})
    assert ids({"text": "", **asked}) == ids(asked) == ids({**asked, "messages": []})
    assert ids({"text": "", "id": 5}) == []
    assert len(ids({"prompt": "Who?", "completion": ""})) == 1


def test_it_says_where_it_was_resumed_and_when_nothing_is_left(capsys, tmp_path):
    data = written(tmp_path, *[{"text": f"{SENTENCE} {number}"} for number in range(4)])
    arguments = ["finetune", "demo", "--data", data, "--device", "cpu", "--output", str(tmp_path / "out"), "--save-every", "1"]
    assert run(capsys, *arguments, "--max-steps", "2")[0] == 0
    assert "resumed from the checkpoint of step 2 of 3" in run(capsys, *arguments, "--resume", "--max-steps", "3")[2]
    assert "all 3 steps are in the checkpoint" in run(capsys, *arguments, "--resume", "--max-steps", "3")[2]
    status, _, err = run(capsys, *arguments, "--resume", "--max-steps", "1")
    assert status == 1
    assert "made after step 3, and 1 steps are asked for" in err
    assert "rank was 16 and is 4" in run(capsys, *arguments, "--resume", "--rank", "4")[2]


@pytest.mark.parametrize(("every", "said"), [(1, "--resume goes on from the checkpoint of step 1"), (0, "no checkpoint of it")])
def test_ctrl_c_says_what_is_left(capsys, tmp_path, monkeypatch, every, said):
    data = written(tmp_path, *[{"text": f"{SENTENCE} {number}"} for number in range(4)])
    plain = loop.evaluate

    def interrupted(model, batches):
        plain(model, batches)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "evaluate", interrupted)
    arguments = ["finetune", "demo", "--data", data, "--eval-data", data, "--eval-every", "1", "--device", "cpu"]
    status, _, err = run(capsys, *arguments, "--output", str(tmp_path / "out"), "--save-every", str(every))
    assert status == 130
    assert said in err


def test_others_may_read_an_adapter_as_the_umask_says(capsys, tmp_path):
    data = written(tmp_path, {"text": SENTENCE})
    before = os.umask(0o027)
    try:
        assert run(capsys, "finetune", "demo", "--data", data, "--device", "cpu", "--output", str(tmp_path / "out"))[0] == 0
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir() if file.is_file()}
    assert modes == dict.fromkeys(modes, 0o640)
