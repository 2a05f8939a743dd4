"""Beginnings of prompts: loaded from disk by another process, and shared by a batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from transformers import DynamicCache

from offload import offload
from offload.kv import prefix_store as prefix
from offload.storage.block_file import path_of
from tests.architectures import VOCAB, make, tokens
from tests.budgets import ALL, NONE, budget_for, spec_of
from tests.offload.test_kv import hybrid

PLENTY = 1 << 30
BLOCK = 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(prefix, "BLOCK_TOKENS", BLOCK)
    monkeypatch.setattr("offload.kv.prefix_cache.BLOCK_TOKENS", BLOCK)
    # However fast the disk of the described machine is.
    monkeypatch.setattr("offload.kv.component.KvComponent._loading_beats_computing", lambda self, nbytes: True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make("llama").save_pretrained(path)
    return str(path)


def plain_in_blocks(model, ids, begun):
    """What the plain model gives when its prompt is split at the same places."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for start in range(0, begun, BLOCK):
            model(input_ids=ids[:, start : start + BLOCK], past_key_values=cache, logits_to_keep=1)
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, past_key_values=cache
        )


def answer(session, ids):
    """Through a beginning that is kept, and how many of its tokens were loaded and computed."""
    use = session.report().kv
    before = use["prefix_loaded_tokens"], use["prefix_computed_tokens"]
    with torch.inference_mode():
        cache = session.kv_cache(ids[0, :-1].tolist())
        output = session.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, past_key_values=cache
        )
    use = session.report().kv
    return output, use["prefix_loaded_tokens"] - before[0], use["prefix_computed_tokens"] - before[1]


def enter(folder, kept, **options):
    return offload(folder, device="cpu", cpu_memory=PLENTY, max_tokens=100, prefix_cache=kept, **options)


@pytest.mark.parametrize("options", [{}, {"kv_memory": 45056}, {"dtype": "bfloat16"}], ids=["plain", "paged", "bf16"])
def test_what_is_loaded_has_the_bits_of_what_is_computed(folder, tmp_path, options):
    ids = tokens(1, 53)
    dtype = torch.bfloat16 if "dtype" in options else torch.float32
    expected = plain_in_blocks(hf.LlamaForCausalLM.from_pretrained(folder, dtype=dtype), ids, 48)
    with enter(folder, tmp_path, **options) as session:
        first, *counts = answer(session, ids)
        assert counts == [0, 48]
        assert session.report().exactness == "rounding"
    with enter(folder, tmp_path, **options) as session:
        again, *counts = answer(session, ids)
        assert counts == [48, 0]
        # Another prompt that begins alike takes what is the same.
        other = torch.cat([ids[:, :40], tokens(1, 30) + 1], dim=1) % VOCAB
        _, *counts = answer(session, other)
        assert counts == [32, 32]
    assert torch.equal(first, expected)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "lfm2", "qwen3_next"])
def test_layers_that_keep_no_tokens_are_kept_whole(name, tmp_path):
    """Sliding, convolution and recurrent layers: all their state is part of a block."""
    model = make(name) if name.startswith("gemma") else hybrid(name)
    path = tmp_path / "model"
    model.save_pretrained(path)
    kept = tmp_path / "kept"
    kept.mkdir()
    ids = tokens(1, 41)
    results = []
    for loaded in (0, 32):
        with enter(str(path), kept) as session:
            output, *counts = answer(session, ids)
            assert counts == [loaded, 32 - loaded]
            results.append(output)
    assert torch.equal(*results)
    assert torch.equal(results[0], plain_in_blocks(type(model).from_pretrained(path).eval(), ids, 32))


def _damage(kind, file: Path, other: Path) -> None:
    content = bytearray(file.read_bytes())
    if kind == "corrupt":
        content[300] ^= 1
        file.write_bytes(content)
    elif kind == "half written":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "foreign":
        file.write_bytes(other.read_bytes())


@pytest.mark.parametrize("kind", ["corrupt", "half written", "empty", "foreign"])
def test_a_damaged_block_is_refused_and_computed_again(folder, tmp_path, kind):
    ids = tokens(1, 53)
    with enter(folder, tmp_path) as session:
        expected, *_ = answer(session, ids)
        keys = session._kv.prefixes._store().keys(ids[0].tolist())
    files = [Path(path_of(str(tmp_path), key)) for key in keys]
    _damage(kind, files[1], files[2])
    with enter(folder, tmp_path) as session:
        got, loaded, computed = answer(session, ids)
        assert torch.equal(got, expected)
        assert (loaded, computed) == (32, 16)
        assert any("cannot be used and is computed again" in sentence for sentence in session.report().fallbacks)
        _, loaded, computed = answer(session, ids)
        assert (loaded, computed) == (48, 0)
    assert not list(tmp_path.glob("*.partial"))


def test_other_weights_find_nothing(folder, tmp_path):
    """Another checkpoint, an adapter, another method: none takes what this model left; changed weights neither keep nor load."""
    peft = pytest.importorskip("peft")
    ids = tokens(1, 53)
    with enter(folder, tmp_path) as session:
        answer(session, ids)
    other = tmp_path / "other"
    make("llama", seed=1).save_pretrained(other)
    with enter(str(other), tmp_path) as session:
        assert answer(session, ids)[1:] == (0, 48)
    with enter(folder, tmp_path, kv_policy="int8") as session:
        assert answer(session, ids)[1:] == (0, 48)
    with enter(folder, tmp_path) as session:
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, session.model)
        assert answer(session, ids)[1:] == (0, 48)
        assert answer(session, ids)[1:] == (48, 0)
    with enter(folder, tmp_path) as session:
        with torch.no_grad():
            session.model.model.norm.weight.mul_(2)
        assert answer(session, ids)[1:] == (0, 0)
        assert any("was changed in this session" in sentence for sentence in session.report().fallbacks)


@pytest.mark.parametrize("residency", [ALL, NONE])
@pytest.mark.parametrize("when", ["before a pass", "after a pass"])
def test_weights_changed_by_a_view_that_torch_does_not_count(residency, when, folder, tmp_path):
    ids = tokens(1, 53)
    budget = budget_for(spec_of(folder, max_tokens=100), residency, 1, 100) + (4 << 20)
    with offload(folder, device="cpu", cpu_memory=budget, max_tokens=100, prefix_cache=tmp_path) as session:
        assert answer(session, ids)[1:] == (0, 48)
        assert answer(session, ids)[1:] == (48, 0)
    with offload(folder, device="cpu", cpu_memory=budget, max_tokens=100, prefix_cache=tmp_path) as session:
        if when == "after a pass":
            assert answer(session, ids)[1:] == (48, 0)
        session.model.model.layers[1].mlp.down_proj.weight.data.mul_(2)
        assert answer(session, ids)[1:] == (0, 0)


def test_a_full_disk_keeps_nothing_and_goes_on(folder, tmp_path, monkeypatch):
    ids = tokens(1, 53)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with enter(folder, tmp_path) as session:
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            patch.setattr(os, "pwrite", full)
            got, loaded, computed = answer(session, ids)
        assert (loaded, computed) == (0, 48)
        expected = plain_in_blocks(hf.LlamaForCausalLM.from_pretrained(folder), ids, 48)
        assert torch.equal(got, expected)
        assert any("is not kept" in sentence for sentence in session.report().fallbacks)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_second_process_gives_the_same_text(tmp_path):
    text = "To be, or not to be, that is the question. " * 30
    command = [sys.executable, "-m", "offload.cli.main", "generate", "demo", "--prompt", text, "--max-new-tokens", "12",
               "--device", "cpu", "--prefix-cache", str(tmp_path), "--json"]  # fmt: skip
    found = [json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout) for _ in range(2)]
    assert found[0]["completions"] == found[1]["completions"]
    computed = found[0]["report"]["kv"]["prefix_computed_tokens"]
    assert computed >= 256
    # The described machine's disk may be slower than its computing: then nothing is loaded, and nothing else changes.
    use = found[1]["report"]["kv"]
    assert use["prefix_loaded_tokens"] + use["prefix_computed_tokens"] == computed


@pytest.mark.parametrize("lengths", [(9, 9, 9, 9), (3, 12, 7, 5)])
def test_a_batch_that_begins_alike(lengths):
    """The beginning is kept once and read once; tokens are those of the plain batch, padded in the middle."""
    model = make("llama")
    same = tokens(1, 70)[0].tolist()
    rests = [tokens(1, count)[0].flip(0).tolist()[::-1] for count in lengths]
    rests = [[(token + row) % 60 + 5 for token in rest] for row, rest in enumerate(rests)]
    widest = max(lengths)
    ids = torch.tensor([same + [0] * (widest - len(rest)) + rest for rest in rests])
    mask = torch.tensor([[1] * 70 + [0] * (widest - len(rest)) + [1] * len(rest) for rest in rests])
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    with torch.inference_mode():
        expected = model.generate(input_ids=ids, **options)
        with offload(
            model, device="cpu", cpu_memory=PLENTY, batch_size=4, max_tokens=100, exactness="rounding", shared_prefix=70
        ) as session:
            cache = session.kv_cache(same, 4)
            assert cache.get_seq_length() == 70
            got = session.model.generate(input_ids=ids, **options, past_key_values=cache)
            for layer in cache.layers:
                kept = sum(block.shape.rows * block.tokens for block in layer.paged.blocks)
                assert kept == 70 + 4 * (layer.paged.length - 70)
            assert session.report().exactness == "rounding"
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["bloom", "t5", "mamba"])
def test_what_cannot_be_shared_is_told(name):
    options = {"device": "cpu", "cpu_memory": PLENTY, "batch_size": 4, "max_tokens": 100, "exactness": "rounding"}
    with offload(make(name), shared_prefix=70, **options) as session:
        assert not session.plan.kv.memory_bytes and not session.shares_prefixes
        assert any("computed and read once per sequence" in sentence for sentence in session.report().fallbacks)


def test_prompts_in_chunks_equal_a_plain_run_in_chunks():
    model, ids = make("llama"), tokens(2, 64)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "prefill_chunk_size": 16}
    with torch.inference_mode():
        expected = model.generate(input_ids=ids, **options)
        with offload(model, device="cpu", cpu_memory=PLENTY, batch_size=2, max_tokens=76, kv_memory=45056) as session:
            assert session.plan.kv.memory_bytes and not session.plan.kv.segments
            assert torch.equal(session.model.generate(input_ids=ids, **options), expected)
