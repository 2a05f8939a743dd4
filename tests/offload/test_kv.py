"""A paged KV cache gives the plain one's bits, wherever its pages are and whatever `generate` does to it."""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from offload import BudgetExceeded, BudgetTooSmall, offload
from offload.kv import demand
from offload.kv.attention import attend
from offload.kv.options import METHODS, Method
from offload.planning.describe import element_bytes_of, kv_sizes
from offload.scheduler.kv_pages import cut, streamed_bytes
from offload.scheduler.model_spec import Workload
from offload.storage.blocks import Tier
from tests.architectures import ARCHITECTURES, BY_NAME, VOCAB, make, oracle_of, tokens
from tests.budgets import NONE, budget_for, spec_of
from tests.delayed import DelayedDevice
from tests.offload.kv_layers import layer_of

BATCH, MAX_TOKENS, NEW_TOKENS, PAGE_TOKENS = 6, 80, 14, 4
PLENTY = 1 << 30

GENERATING = [architecture.name for architecture in ARCHITECTURES if architecture.generates]

DEVICE, BELOW, ACROSS = "device", "below", "across"


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    """Pages of four tokens, so that short texts have several."""
    monkeypatch.setitem(METHODS, "none", Method(page_tokens=lambda total: PAGE_TOKENS))
    # Paged, however much memory there is.
    monkeypatch.setattr("offload.kv.demand._whole", lambda *sizes: 1 << 60)


def memory_for(session_bytes: int, layers: int, page_bytes: int, placement: str) -> int:
    """Device memory with which all, none or some of the full pages stay."""
    least = session_bytes + (layers + 2) * page_bytes
    return {DEVICE: least + 400 * page_bytes, BELOW: least, ACROSS: least + 2 * layers * page_bytes}[placement]


@contextmanager
def paged(model: Any, placement: str, segments: bool = False, **options: Any):
    shape = kv_sizes(model.config, element_bytes_of(model)).shape
    assert shape is not None
    assembled = 0 if segments else BATCH * MAX_TOKENS * shape.token_bytes
    page_bytes = -(-BATCH * PAGE_TOKENS * shape.token_bytes // 4096) * 4096
    memory = memory_for(assembled, shape.layers, page_bytes, placement)
    if segments:
        options["exactness"] = "rounding"
    with offload(model, cpu_memory=PLENTY, batch_size=BATCH, max_tokens=MAX_TOKENS, kv_memory=memory, **options) as session:
        assert session.plan.kv.memory_bytes == memory
        assert bool(session.plan.kv.segments) == segments
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
    if RESETS:
        cache.reset()
        logits.append(model(input_ids=ids, past_key_values=cache).logits)
    return logits


def _plain_resets() -> bool:
    layer = DynamicLayer()
    layer.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    layer.reset()
    return layer.get_seq_length() == 0


RESETS = _plain_resets()
"""Older versions of transformers leave a reset cache as long as it was, so that there is nothing to compare with."""


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
    for pool in session._kv.paged.store.pools:
        take = pool.slots.take

        def poisoned(take=take, pool=pool):
            slot = take()
            if slot is not None:
                pool.slots.tensor(slot).fill_(0xFF)
            return slot

        pool.slots.take = poisoned


def _cases() -> Iterator[Any]:
    """All; those of bf16 that say what others say are not run twice in CI."""
    for name in GENERATING:
        for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            marks = [pytest.mark.slow] if dtype == torch.bfloat16 and name not in IN_BF16 else []
            yield pytest.param(name, dtype, id=f"{name}-{label}", marks=marks)


IN_BF16 = ("llama", "gemma2", "gpt2", "mixtral", "t5", "llava")


@pytest.mark.parametrize("placement", [DEVICE, BELOW, ACROSS])
@pytest.mark.parametrize(("name", "dtype"), list(_cases()))
def test_identical_on_device_and_disk(name, dtype, placement):
    expected = wanted(name, dtype)
    with paged(model_of(name, dtype), placement, device="cpu") as session:
        poison_free_slots(session)
        for mode in modes(name):
            assert_same(run(mode, name, session.model), expected[mode], mode)
        use = session.report().kv
        assert session.report().exactness == "identical"
        assert use["full_pages"] > 20
        assert (use["onloaded_bytes"] > 0) == (placement != DEVICE)
        assert (use["peak_nvme_bytes"] > 0) == (placement != DEVICE)


@pytest.mark.parametrize("host", ["cpu", "disk", "both"])
@pytest.mark.parametrize("placement", [BELOW, ACROSS])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "t5"])
def test_identical_beside_a_device_with_late_copies(name, placement, host, monkeypatch):
    """Pages in CPU memory, on disk, and on both; copies end late and out of order."""
    expected = wanted(name, torch.float32)
    monkeypatch.setattr("offload.api.resolve_device", lambda name: DelayedDevice(0.001))
    pages = {"cpu": 4000, "disk": 0, "both": 12}[host]
    monkeypatch.setattr(Workload, "kv_host_bytes", lambda self, model, host_bytes: pages * 4096)
    with paged(model_of(name, torch.float32), placement, device="delayed", gpu_memory=PLENTY) as session:
        for mode in modes(name):
            assert_same(run(mode, name, session.model), expected[mode], mode)
        peaks = session._kv.paged.store.peak_bytes
        assert (peaks[Tier.CPU] > 0) == (host != "disk")
        assert (peaks[Tier.DISK] > 0) == (host != "cpu")


# -- attention over segments


ROUNDING = ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "mixtral", "gpt_neox", "opt", "gpt_oss", "llava"]
"""What takes another attention than its own; softcap, sinks and sliding neighbours among them."""


@pytest.mark.parametrize("placement", [DEVICE, BELOW, ACROSS])
@pytest.mark.parametrize("name", ROUNDING)
def test_tokens_are_equal_when_attention_reads_pieces(name, placement):
    expected = wanted(name, torch.float32)
    model = model_of(name, torch.float32)
    before = model.config._attn_implementation
    with paged(model, placement, segments=True, device="cpu") as session:
        poison_free_slots(session)
        for mode in modes(name):
            for mine, theirs in zip(run(mode, name, session.model), expected[mode], strict=True):
                if theirs.is_floating_point():
                    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)
                else:
                    assert torch.equal(mine, theirs), mode
        report = session.report()
        assert report.exactness == "rounding"
        assert not [sentence for sentence in report.fallbacks if "put together" in sentence]
        assert (report.kv["onloaded_bytes"] > 0) == (placement != DEVICE)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("host", ["cpu", "both"])
def test_the_cpu_reads_pages_where_they_are(host, monkeypatch):
    """Pages in CPU memory are attended to by the CPU: they never cross the link."""
    monkeypatch.setattr("offload.api.resolve_device", lambda name: DelayedDevice(0.001))
    pages = {"cpu": 4000, "both": 12}[host]
    monkeypatch.setattr(Workload, "kv_host_bytes", lambda self, model, host_bytes: pages * 4096)
    monkeypatch.setattr("offload.kv.paged_cache.cpu_reads_pages", lambda *machine: True)
    with paged(model_of("llama", torch.float32), BELOW, True, device="delayed", gpu_memory=PLENTY) as session:
        for mode in modes("llama"):
            for mine, theirs in zip(run(mode, "llama", session.model), wanted("llama", torch.float32)[mode], strict=True):
                if not theirs.is_floating_point():
                    assert torch.equal(mine, theirs), mode
        assert (session.report().kv["onloaded_bytes"] > 0) == (host == "both")


@pytest.mark.parametrize(("rows", "queries", "masked"), [(1, 1, False), (3, 1, True), (2, 7, True)])
def test_pieces_are_as_near_to_the_truth_as_the_stock_kernel(rows, queries, masked):
    """bf16: the error against an fp32 run of the same cache is at most 1.5 times that of stock attention in bf16."""
    ratios = []
    for seed in range(5):
        torch.manual_seed(seed)
        heads, kv_heads, length, dim = 8, 2, 300, 32
        keys, values = (torch.randn(rows, kv_heads, length, dim).bfloat16() for _ in range(2))
        query = (2 * torch.randn(rows, heads, queries, dim)).bfloat16()
        mask = torch.ones(rows, 1, queries, length, dtype=torch.bool).tril(length - queries)
        if masked:
            mask[0, ..., :40] = False
        whole = [part.repeat_interleave(heads // kv_heads, dim=1) for part in (keys, values)]
        stock = torch.nn.functional.scaled_dot_product_attention(query, *whole, attn_mask=mask)
        exact = torch.nn.functional.scaled_dot_product_attention(
            query.float(), *(part.float() for part in whole), attn_mask=mask
        )
        with layer_of(keys, values, page_tokens=16) as layer:
            mine = attend(layer, query, mask, dim**-0.5)
        ratios.append(float((mine.float() - exact).norm() / (stock.float() - exact).norm()))
    assert max(ratios) <= 1.5, ratios


# -- how much is moved


@pytest.mark.parametrize("segments", [False, True])
def test_eight_times_the_memory_moves_no_byte_twice(segments, monkeypatch):
    """Each full page is written once; each step reads what does not stay, once, as the plan says; nothing is over budget."""
    torch.manual_seed(0)
    layers = 4 if segments else 24
    small = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 16, "num_attention_heads": 4}
    config = hf.LlamaConfig(**small, num_hidden_layers=layers, max_position_embeddings=2048)
    model = hf.LlamaForCausalLM(config).eval()
    total = 1024
    whole = layers * total * 2 * 64 * 4
    memory = whole // 8
    ids = tokens(1, total - 8)
    with torch.inference_mode():
        expected = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    # No page gets full in the seven steps.
    page_tokens = 64 if segments else 32
    monkeypatch.setitem(METHODS, "none", Method(page_tokens=lambda total: page_tokens))
    options = {"exactness": "rounding"} if segments else {}
    with offload(model, device="cpu", cpu_memory=PLENTY, max_tokens=total, kv_memory=memory, **options) as session:
        part = session._kv.paged
        pages = part.pages
        assert cut(part.shape, 1, total, memory, segments, page_tokens) == pages
        with torch.inference_mode():
            cache = session.kv_cache()
            logits = session.model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
            chosen = [int(logits[0, -1].argmax())]
            assert part.onloaded_bytes <= pages.ring_pages * pages.page_bytes
            part.store._stream.forget()
            before = part.onloaded_bytes
            for _ in range(7):
                output = session.model(input_ids=torch.tensor([chosen[-1:]]), past_key_values=cache)
                chosen.append(int(output.logits[0, -1].argmax()))
        assert expected[0, total - 8 :].tolist() == chosen
        blocks = [block for layer in cache.layers for block in layer.paged.blocks]
        below = sum(block.page.tier is not Tier.DEVICE for block in blocks) * pages.page_bytes
        assert below > whole / 2
        assert below == streamed_bytes(part.shape, pages, 1, cache.get_seq_length())
        assert below == session.report().kv["planned_bytes_per_pass"]
        assert part.written_bytes == below
        ahead = len(part.store._stream._fetches) * pages.page_bytes
        assert part.onloaded_bytes - before == 7 * below + ahead
        assert ahead <= pages.ring_pages * pages.page_bytes
        held = sum(pool.slots.held_bytes for pool in part.store.pools)
        assert held + pages.assembled_bytes <= memory == session.report().kv["memory_bytes"]


# -- models with layers of other kinds

_HYBRID = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
           "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0}  # fmt: skip


@functools.cache
def hybrid(name: str) -> Any:
    torch.manual_seed(0)
    if name == "lfm2":
        kinds = ["conv", "full_attention", "conv", "full_attention"]
        model = hf.Lfm2ForCausalLM(hf.Lfm2Config(**_HYBRID, layer_types=kinds, block_auto_adjust_ff_dim=False))
    elif name == "qwen3_next":
        kinds = ["linear_attention", "full_attention"] * 2
        extra = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                 "num_experts": 0, "mlp_only_layers": [0, 1, 2, 3]}  # fmt: skip
        model = hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**_HYBRID, layer_types=kinds, **extra))
    else:
        shared = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB,
                  "layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 8}  # fmt: skip
        fields = _HYBRID | {"num_hidden_layers": 6} | shared
        model = hf.Gemma3nForCausalLM(hf.Gemma3nTextConfig(**fields, laurel_rank=4, activation_sparsity_pattern=[0.0] * 6))
    for value in model.parameters():
        value.data = value.data.clone() * (2 if value.dim() > 1 else 1)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "segments"),
    # The attention of qwen3_next is its own code.
    [("lfm2", False), ("lfm2", True), ("qwen3_next", False), ("gemma3n", False), ("gemma3n", True)],
)
@pytest.mark.parametrize("placement", [BELOW, ACROSS])
def test_layers_of_other_kinds_stay_what_they_are(name, placement, segments):
    """Convolutions, recurrent states, layers that share the keys of others: what keeps all tokens is paged, and nothing else."""
    model = hybrid(name)
    ids = tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    ways = [{"do_sample": False}, {"do_sample": False, "num_beams": 3}]
    with torch.inference_mode():
        expected = [model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=14, **way) for way in ways]
        with paged(model, placement, segments, device="cpu") as session:
            for way, theirs in zip(ways, expected, strict=True):
                mine = session.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=14, **way)
                assert torch.equal(mine, theirs)
            report = session.report()
            assert report.kv["full_pages"] > 8
            assert report.exactness == ("rounding" if segments else "identical")


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "lfm2", "qwen3_next"])
def test_the_state_of_other_layers_goes_down_too(name, monkeypatch):
    """Windows, convolutions and recurrent states are in pages while other layers have their turn: the plain cache's bits."""
    real = demand.paged_ways
    offloaded_state = lambda *sizes, **options: [replace(way, state_offload=True) for way in real(*sizes, **options)]  # noqa: E731
    monkeypatch.setattr(demand, "paged_ways", offloaded_state)
    model = model_of(name, torch.float32) if name in SLIDING else hybrid(name)
    ids = tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    ways = [{"do_sample": False}, {"do_sample": False, "num_beams": 3}]
    if name in SLIDING:
        ways += [{"do_sample": False, "prompt_lookup_num_tokens": 2}]
    with torch.inference_mode():
        rows = [1 if "prompt_lookup_num_tokens" in way else 2 for way in ways]
        inputs = [{"input_ids": ids[:count], "attention_mask": mask[:count], "max_new_tokens": 14} for count in rows]
        expected = [model.generate(**given, **way) for given, way in zip(inputs, ways, strict=True)]
        with paged(model, BELOW, device="cpu") as session:
            assert session.plan.kv.state_offload
            for given, way, theirs in zip(inputs, ways, expected, strict=True):
                assert torch.equal(session.model.generate(**given, **way), theirs)
            cache = session.kv_cache()
            session.model(input_ids=ids, past_key_values=cache)
            away = [layer for layer in cache.layers if "_offloaded_state" in vars(layer)]
            assert away and session._kv.paged.written_bytes > 0
            # Whoever looks finds it.
            found = getattr(away[0], next(iter(vars(away[0])["_offloaded_state"])))
            assert isinstance(found, (torch.Tensor, dict)) and "_offloaded_state" not in vars(away[0])
            del cache, away, found
            assert sum(session._kv.paged.store._bytes.values()) == 0


def test_a_pass_that_keeps_no_cache_is_charged_none():
    """It fits where the cache of so many tokens would not, and gives nothing up."""
    model = make("llama")
    twin = oracle_of(model)
    ids = torch.randint(3, VOCAB, (2, 60), generator=torch.Generator().manual_seed(2))
    spec = spec_of(model, batch_size=2, max_tokens=60)
    budget = budget_for(spec, NONE, 2, 60) - Workload(2, 60, 60).kv_bytes(spec) + Workload(2, 8, 8).kv_bytes(spec)
    with offload(model, device="cpu", cpu_memory=budget, batch_size=2, max_tokens=8) as session, torch.no_grad():
        assert torch.equal(session.model(ids, use_cache=False).logits, twin(ids, use_cache=False).logits)
        with pytest.raises(BudgetExceeded) as refused:
            session.model(ids)
    assert refused.value.least_bytes > budget
    enough = refused.value.least_bytes
    with offload(model, device="cpu", cpu_memory=enough, batch_size=2, max_tokens=8) as session, torch.no_grad():
        assert torch.equal(session.model(ids).logits, twin(ids).logits)


def test_a_cache_that_the_model_makes_itself_is_in_pages_too():
    model = make("llama")
    twin = oracle_of(model)
    ids = torch.randint(3, VOCAB, (1, 64), generator=torch.Generator().manual_seed(2))
    with offload(model, device="cpu", cpu_memory="16MiB", batch_size=1, max_tokens=80, kv_memory="32KiB") as session:
        with torch.no_grad():
            ours, theirs = session.model(ids), twin(ids)
            assert torch.equal(ours.logits, theirs.logits)
            again = session.model(ids[:, :1], past_key_values=ours.past_key_values)
            wanted = twin(ids[:, :1], past_key_values=theirs.past_key_values).logits
        # In so little memory a layer is read piece by piece, which rounds.
        torch.testing.assert_close(again.logits, wanted)
        assert session.report().kv["peak_nvme_bytes"] > 0


@pytest.mark.parametrize("form", ["path", "module"])
def test_where_nobody_said_how_many_tokens_what_fits_is_reserved(form, tmp_path):
    model = make("llama")
    model.config.max_position_embeddings = 2048
    model.save_pretrained(tmp_path)
    target = str(tmp_path) if form == "path" else model
    budget = budget_for(spec_of(model, max_tokens=256), NONE, 1, 256)
    with pytest.raises(BudgetTooSmall, match="2048 tokens"):
        offload(target, device="cpu", cpu_memory=100_000, max_tokens=2048).__enter__()
    with offload(target, device="cpu", cpu_memory=budget + 8192) as session:
        assert session.plan.rounds == ()
        assert any("since 2,048 do not fit" in sentence for sentence in session.report().fallbacks)
