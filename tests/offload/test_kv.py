"""A paged KV cache gives the plain one's bits, wherever its pages are and whatever `generate` does to it."""

import copy
import functools
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import DynamicCache

from offload import offload
from offload.kv.options import METHODS, Method
from scheduler.model_spec import Workload
from storage.blocks import Tier
from tests.architectures import ARCHITECTURES, BY_NAME, VOCAB, make, oracle_of, tokens
from tests.delayed import DelayedDevice

BATCH, MAX_TOKENS, NEW_TOKENS, PAGE_TOKENS = 6, 80, 14, 4
PLENTY = 1 << 30

GENERATING = [architecture.name for architecture in ARCHITECTURES if architecture.generates]
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]

DEVICE, BELOW, ACROSS = "device", "below", "across"


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    """Pages of four tokens, so that short texts have several."""
    monkeypatch.setitem(METHODS, "none", Method(page_tokens=PAGE_TOKENS))
    # Paged, however much memory there is.
    monkeypatch.setattr("offload.runtime.decision._whole", lambda *sizes: 1 << 60)


def memory_for(session_bytes: int, layers: int, page_bytes: int, placement: str) -> int:
    """Device memory with which all, none or some of the full pages stay."""
    least = session_bytes + (layers + 2) * page_bytes
    return {DEVICE: least + 400 * page_bytes, BELOW: least, ACROSS: least + 2 * layers * page_bytes}[placement]


@contextmanager
def paged(model: Any, placement: str, segments: bool = False, **options: Any):
    from offload.model.sizing import element_bytes_of, kv_sizes

    shape = kv_sizes(model.config, element_bytes_of(model)).shape
    assert shape is not None
    assembled = 0 if segments else BATCH * MAX_TOKENS * shape.token_bytes
    page_bytes = -(-BATCH * PAGE_TOKENS * shape.token_bytes // 4096) * 4096
    memory = memory_for(assembled, shape.layers, page_bytes, placement)
    if segments:
        options["exactness"] = "rounding"
    with offload(model, cpu_memory=PLENTY, batch_size=BATCH, max_tokens=MAX_TOKENS, kv_memory=memory, **options) as session:
        assert session.plan.kv_memory_bytes == memory
        assert bool(session.plan.kv_segments) == segments
        yield session


def _config_of(name: str) -> dict[str, Any]:
    return {"layer_types": ["sliding_attention", "full_attention"] * 2} if name in ("gemma3", "mistral") else {}


@functools.cache
def model_of(name: str, dtype: torch.dtype) -> Any:
    """With layers that keep all tokens in every family."""
    if name == "gemma3":
        fields = BY_NAME["gemma3"].make(False).config.to_dict() | _config_of(name)
        torch.manual_seed(0)
        model = hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**fields)).eval()
    elif name == "mistral":
        fields = BY_NAME["mistral"].make(False).config.to_dict() | {"sliding_window": None}
        torch.manual_seed(0)
        model = hf.MistralForCausalLM(hf.MistralConfig(**fields)).eval()
    else:
        return oracle_of(make(name, False, dtype))
    for value in model.parameters():
        value.data = (value.data * (4 if value.dim() > 1 else 1)).to(dtype).clone()
    return model


def inputs_of(name: str, rows: int, length: int = 11) -> dict[str, torch.Tensor]:
    inputs = dict(BY_NAME[name].inputs())
    inputs.pop("decoder_input_ids", None)
    if "pixel_values" in inputs:
        return {key: value[:rows] for key, value in inputs.items()}
    ids = tokens(rows, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def left_padded(name: str) -> dict[str, torch.Tensor]:
    inputs = inputs_of(name, 2)
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][1, : 1 if "pixel_values" in inputs else 5] = 0
    return inputs


@functools.cache
def _assistant(name: str) -> Any:
    if name in ("t5", "bart", "llava"):
        return make(name, True, seed=9)
    torch.manual_seed(9)
    small = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**small)).eval()


GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}


def _cut_and_go_on(model: Any) -> list[torch.Tensor]:
    """`crop`, `batch_repeat_interleave`, `batch_select_indices` and `reorder_cache`, in the middle of pages and at their ends."""
    cache = DynamicCache(config=model.config)
    ids = tokens(2, 22)
    logits = [model(input_ids=ids[:, :9], past_key_values=cache).logits]
    logits += [model(input_ids=ids[:, index : index + 1], past_key_values=cache).logits for index in range(9, 15)]
    for remove in (1, 5, 2):
        cache.crop(-remove)
        length = cache.get_seq_length()
        logits.append(model(input_ids=ids[:, length : length + 3], past_key_values=cache).logits)
    cache.batch_repeat_interleave(3)
    length = cache.get_seq_length()
    more = tokens(6, 24)
    logits.append(model(input_ids=more[:, length : length + 1], past_key_values=cache).logits)
    cache.batch_select_indices(torch.tensor([4, 0, 2]))
    logits.append(model(input_ids=more[:3, :1], past_key_values=cache).logits)
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    twin = copy.deepcopy(cache)
    for each in (cache, twin, cache, twin):
        logits += [model(input_ids=more[3:, :2], past_key_values=each).logits]
    cache.reset()
    logits.append(model(input_ids=ids, past_key_values=cache).logits)
    return logits


def run(mode: str, name: str, model: Any) -> list[torch.Tensor]:
    with torch.inference_mode():
        match mode:
            case "greedy":
                result = model.generate(**inputs_of(name, 2), **GREEDY, output_logits=True, return_dict_in_generate=True)
                return [result.sequences, *result.logits]
            case "beam":
                return [model.generate(**inputs_of(name, 2), **GREEDY, num_beams=3)]
            case "sampling":
                torch.manual_seed(11)
                return [model.generate(**inputs_of(name, 2), max_new_tokens=NEW_TOKENS, do_sample=True)]
            case "several":
                torch.manual_seed(12)
                return [model.generate(**inputs_of(name, 2), max_new_tokens=NEW_TOKENS, do_sample=True, num_return_sequences=3)]
            case "left padding":
                return [model.generate(**left_padded(name), **GREEDY)]
            case "prompt lookup":
                return [model.generate(**inputs_of(name, 1), **GREEDY, prompt_lookup_num_tokens=3)]
            case "assisted":
                return [model.generate(**inputs_of(name, 1), **GREEDY, assistant_model=_assistant(name))]
            case "two turns":
                cache = DynamicCache(config=model.config)
                ids = inputs_of(name, 2)["input_ids"]
                first = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY, past_key_values=cache)
                more = torch.cat([first, tokens(2, 6)], dim=1)
                return [
                    first,
                    model.generate(input_ids=more, attention_mask=torch.ones_like(more), **GREEDY, past_key_values=cache),
                ]
            case "crop and select":
                return _cut_and_go_on(model)
    raise AssertionError(mode)


MODES = ("greedy", "beam", "sampling", "several", "left padding", "prompt lookup", "assisted")
OF_DECODERS = ("two turns", "crop and select")
SLIDING = ("gemma2", "gemma3")
"""Layers that slide cannot be cropped but right after they were told to remember."""


def modes(name: str) -> list[str]:
    if BY_NAME[name].inputs().keys() & {"decoder_input_ids", "pixel_values"}:
        return list(MODES)
    return [*MODES, *(mode for mode in OF_DECODERS if not (name in SLIDING and mode == "crop and select"))]


@functools.cache
def wanted(name: str, dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    return {mode: run(mode, name, model_of(name, dtype)) for mode in modes(name)}


def assert_same(got: list[torch.Tensor], expected: list[torch.Tensor], what: str) -> None:
    assert len(got) == len(expected), what
    for index, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(mine, theirs), f"{what}: tensor {index} differs"


def poison_free_slots(session: Any) -> None:
    """What is read before it is there is no number."""
    for pool in session._kv.store.pools:
        take = pool.slots.take

        def poisoned(take=take, pool=pool):
            slot = take()
            if slot is not None:
                pool.slots.tensor(slot).fill_(0xFF)
            return slot

        pool.slots.take = poisoned


@pytest.mark.parametrize("placement", [DEVICE, BELOW, ACROSS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GENERATING)
def test_identical_on_device_and_disk(name, dtype, placement):
    expected = wanted(name, dtype)
    with paged(model_of(name, dtype), placement, device="cpu") as session:
        poison_free_slots(session)
        for mode in modes(name):
            assert_same(run(mode, name, session.model), expected[mode], mode)
        use = session.report().kv
        assert session.report().exactness == "identical"
        assert use["sealed_pages"] > 20
        assert (use["brought_bytes"] > 0) == (placement != DEVICE)
        assert (use["peak_nvme_bytes"] > 0) == (placement != DEVICE)


@pytest.mark.parametrize("host", ["cpu", "disk", "both"])
@pytest.mark.parametrize("placement", [BELOW, ACROSS])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "t5"])
def test_identical_beside_a_device_with_late_copies(name, placement, host, monkeypatch):
    """Pages in CPU memory, on disk, and on both; copies end late and out of order."""
    expected = wanted(name, torch.float32)
    monkeypatch.setattr("offload.api.resolve_device", lambda name: DelayedDevice(0.001))
    pages = {"cpu": 4000, "disk": 0, "both": 8}[host]
    monkeypatch.setattr(Workload, "kv_host_bytes", lambda self, model, host_bytes: pages * 4096)
    with paged(model_of(name, torch.float32), placement, device="delayed", gpu_memory=PLENTY) as session:
        for mode in modes(name):
            assert_same(run(mode, name, session.model), expected[mode], mode)
        peaks = session._kv.store.peak_bytes
        assert (peaks[Tier.CPU] > 0) == (host != "disk")
        assert (peaks[Tier.DISK] > 0) == (host != "cpu")
