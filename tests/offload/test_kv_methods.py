"""Lossy ways to keep keys and values, and what is asked of them wrongly."""

import copy
import errno
import os

import pytest
import torch
import transformers as hf

from offload import BudgetTooSmall, ConfigError, DiskFull, offload
from offload.kv.attention import attend
from offload.kv.layer import AppendOrder, PagedLayer
from offload.kv.options import METHODS, Method
from offload.kv.policies.base import FullAttention
from offload.kv.policies.budget import KvBudget
from offload.kv.policies.retrieve import Retrieve
from offload.kv.policies.window import SINK_TOKENS, Window
from offload.kv.quantization import PageQuantizer
from offload.storage.blocks import Tier
from offload.storage.errors import OffloadError, ReadError
from offload.storage.pages.file import PageFile
from tests.architectures import VOCAB, make, tokens
from tests.offload.kv_layers import layer_of, store_of

PLENTY = 1 << 30


def pair_of(rows=2, heads=2, length=64, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, heads, length, dim, generator=generator) for _ in range(2))


# -- quantised pages


@pytest.mark.parametrize(("bits", "error"), [(8, 0.01), (4, 0.12)])
@pytest.mark.parametrize("tokens_a_page", [7, 32, 50])
@pytest.mark.parametrize("outlier", [1, 100])
def test_a_coded_page_is_near_the_page(bits, error, tokens_a_page, outlier):
    keys, values = pair_of(length=2 * tokens_a_page)
    keys[..., 3] *= outlier
    with layer_of(keys, values, tokens_a_page, codec=PageQuantizer(bits)) as layer:
        assert [block.coded for block in layer.blocks] == [True, True]
        got = layer.assembled()
    for mine, theirs in zip(got, (keys, values), strict=True):
        scale = theirs.std(dim=(0, 1, 2), keepdim=True)
        assert float(((mine - theirs) / scale).square().mean().sqrt()) < error


def test_keys_quantised_token_by_token_would_not_survive_an_outlier():
    """What the layout is for: with a scale for each token, the other channels of the keys are lost."""
    keys, values = pair_of(length=32)
    keys[..., 3] *= 100
    with layer_of(values, keys, 32, codec=PageQuantizer(4)) as layer:
        # As values, which have a scale for each token.
        got = layer.assembled().values
    others = torch.arange(16) != 3
    wrong = ((got - keys)[..., others] / keys[..., others].std()).square().mean().sqrt()
    assert float(wrong) > 0.5


def test_attention_to_one_coded_page():
    """A page alone is read as it was decoded, without a copy in between."""
    keys, values = pair_of(length=32)
    query = torch.randn(2, 4, 1, 16, generator=torch.Generator().manual_seed(1))
    with layer_of(keys, values, 32, codec=PageQuantizer(8)) as layer:
        got = attend(layer, query, None, 0.25)
    whole = [part.repeat_interleave(2, dim=1) for part in (keys, values)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *whole, scale=0.25)
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


def test_what_no_code_is_good_enough_for_is_kept():
    keys, values = pair_of(length=32)
    values[0, 0, 3, 5] = torch.inf
    with layer_of(keys, values, 8, codec=PageQuantizer(4)) as layer:
        assert [block.coded for block in layer.blocks] == [False, True, True, True]
        assert layer.store.kept_raw == 1
        assert torch.equal(layer.assembled().values[:, :, :8], values[:, :, :8])


def test_coded_pages_are_coded_once_and_pass_through_the_disk():
    keys, values = pair_of(length=80)
    with store_of(device_pages=6, resident_pages=1, page_tokens=8, codec=PageQuantizer(4)) as store:
        layer = PagedLayer(store, FullAttention(), AppendOrder())
        layer.append(keys, values)
        first = layer.assembled()
        coded = store.pools[1]
        written = coded.written_bytes
        assert written > 0
        assert all(torch.equal(one, other) for one, other in zip(first, layer.assembled(), strict=True))
        assert coded.written_bytes == written
        assert coded.page_bytes < store.raw.page_bytes


# -- windows and retrieval


def test_a_window_sees_the_first_and_the_last_tokens():
    keys, values = pair_of(rows=1, length=200)
    query = torch.randn(1, 4, 1, 16, generator=torch.Generator().manual_seed(1))
    with layer_of(keys, values, 8, lambda: Window(KvBudget(tokens=40))) as layer:
        got = attend(layer, query, None, 0.25)
        assert layer.length == 200
        assert sum(len(span) for span in layer.positions()) < 120
        assert layer.positions()[0].start == 0
        seen = torch.zeros(200, dtype=torch.bool)
        seen[:SINK_TOKENS] = seen[200 - 40 + SINK_TOKENS :] = True
        whole = [part.repeat_interleave(2, dim=1)[:, :, seen] for part in (keys, values)]
        expected = torch.nn.functional.scaled_dot_product_attention(query, *whole, scale=0.25)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        # Going back a little is exact; further, it is refused.
        layer.truncate(30)
        layer.append(keys[:, :, 170:], values[:, :, 170:])
        torch.testing.assert_close(attend(layer, query, None, 0.25), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(ConfigError, match="takes back at most"):
            layer.truncate(150)


def test_retrieval_finds_the_token_that_is_asked_for():
    """Of 256 tokens one has the key that the query is like; each sequence sees a sixteenth of them, and that one among them."""
    keys, values = pair_of(rows=3, heads=1, length=256)
    query = 3 * torch.nn.functional.normalize(torch.randn(3, 1, 1, 16, generator=torch.Generator().manual_seed(2)), dim=-1)
    for row, place in enumerate((60, 100, 222)):
        keys[row, :, place] = 4 * query[row, :, 0]
    with layer_of(keys, values, 4, lambda: Retrieve(KvBudget(share=1 / 16))) as layer:
        choices = layer.visible(query)
        seen = torch.zeros(3, 256, dtype=torch.bool)
        for choice in choices:
            every = torch.ones(3, 1, 1, 1, dtype=torch.bool) if choice.allowed is None else choice.allowed
            seen[:, choice.block.start : choice.block.end] |= every.view(3, 1)
        assert seen.sum(dim=1).le(16).all()
        assert seen[0, 60] and seen[1, 100] and seen[2, 222]
        exact = torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=1.0)
        torch.testing.assert_close(attend(layer, query, None, 1.0), exact, rtol=1e-2, atol=1e-2)
        # The same after the batch was shuffled, and in a copy.
        rows = torch.tensor([2, 0, 1])
        layer.select(rows)
        torch.testing.assert_close(attend(layer, query[rows], None, 1.0), exact[rows], rtol=1e-2, atol=1e-2)
        twin = layer.copied(AppendOrder())
        torch.testing.assert_close(attend(twin, query[rows], None, 1.0), exact[rows], rtol=1e-2, atol=1e-2)


def test_retrieval_moves_what_it_sees_and_no_more():
    torch.manual_seed(0)
    small = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 16, "num_attention_heads": 4}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**small, num_hidden_layers=2, max_position_embeddings=2048)).eval()
    options = {"kv_memory": 400_000, "kv_policy": "retrieve", "kv_budget": 0.1}
    with offload(model, device="cpu", cpu_memory=PLENTY, max_tokens=1100, **options) as session, torch.inference_mode():
        part = session._kv.paged
        cache = session.kv_cache()
        session.model(input_ids=tokens(1, 1024), past_key_values=cache)
        before = part.onloaded_bytes
        for _ in range(4):
            session.model(input_ids=tokens(1, 1), past_key_values=cache)
        kept = sum(len(span) for layer in cache.layers for span in layer.paged.positions())
        assert kept == 2 * 1028
        assert 0 < part.onloaded_bytes - before <= 4 * 0.1 * 2 * 1028 * 512
        report = session.report()
        assert report.exactness == "lossy: KV cache retrieve, queries see 10% of the context"
        assert "lossy" in str(report)


@pytest.mark.parametrize("policy", ["int8", "int4", "window", "retrieve"])
@pytest.mark.parametrize("mode", ["beam", "padded", "lookup", "chat"])
def test_every_method_in_every_way_of_use(policy, mode):
    """Nothing raises, positions go on, and with a budget of everything the tokens are the plain model's."""
    model = make("llama")
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    if mode == "padded":
        mask[1, :9] = 0
    if mode == "lookup":
        ids, mask = ids[:1], mask[:1]
    how = {"beam": {"num_beams": 2}, "lookup": {"prompt_lookup_num_tokens": 3}}.get(mode, {})
    options = {"max_new_tokens": 30, "do_sample": False, **how}
    exact = {"kv_budget": 1.0} if policy in ("window", "retrieve") else {}
    with torch.inference_mode():
        expected = model.generate(input_ids=ids, attention_mask=mask, **options)
        with offload(
            model, device="cpu", cpu_memory=PLENTY, batch_size=4, max_tokens=100, kv_policy=policy, **exact
        ) as session:
            cache = session.kv_cache()
            got = session.model.generate(input_ids=ids, attention_mask=mask, **options, past_key_values=cache)
            if exact:
                assert torch.equal(got, expected)
            if mode == "chat":
                more = torch.cat([got, tokens(2, 5)], dim=1)
                session.model.generate(input_ids=more, attention_mask=torch.ones_like(more), **options, past_key_values=cache)
                assert cache.get_seq_length() == 30 + 30 + 5 + 30 - 1
            assert session.report().exactness.startswith("lossy")


# -- asked wrongly, and what fails


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"kv_memory": "4KiB"}, "it takes at least"),
        ("llama", {"kv_policy": "int2"}, "is not known"),
        ("llama", {"kv_policy": "window", "kv_budget": "a lot"}, "neither a share"),
        ("llama", {"kv_policy": "window", "kv_budget": 1.5}, "neither a share"),
        ("llama", {"kv_policy": "int8", "kv_budget": 0.5}, "reads everything"),
        ("llama", {"kv_memory": "many"}, "is not a size"),
        ("llama", {"shared_prefix": 4}, "give exactness='rounding'"),
        ("llama", {"training": True, "kv_memory": "1MiB"}, "keeps no KV cache"),
        ("llama", {"prefix_cache": "/no/such/folder"}, "does not exist"),
        ("t5", {"kv_policy": "retrieve"}, "its own code"),
        ("t5", {"kv_memory": "24KiB"}, "it takes at least"),
        ("bloom", {"kv_policy": "window"}, "its own code"),
        ("mamba", {"kv_memory": "1MiB"}, "has no layers that keep"),
        ("bert", {"kv_policy": "int8"}, "has no layers that keep"),
    ],
)
def test_what_cannot_be_met_is_refused(name, options, message):
    with pytest.raises(OffloadError, match=message), offload(make(name), device="cpu", max_tokens=100, **options):
        pass


def test_the_least_memory_that_the_refusal_names_works():
    options = {"device": "cpu", "cpu_memory": PLENTY, "max_tokens": 100}
    with pytest.raises(BudgetTooSmall) as refused, offload(make("llama"), kv_memory=5000, **options):
        pass
    with offload(make("llama"), kv_memory=refused.value.least_bytes, **options) as session:
        assert session.plan.kv.memory_bytes == refused.value.least_bytes
    with pytest.raises(BudgetTooSmall), offload(make("llama"), kv_memory=refused.value.least_bytes - 1, **options):
        pass


def test_too_little_for_one_piece_is_told_with_what_would_do():
    options = {"device": "cpu", "cpu_memory": PLENTY, "max_tokens": 100}
    with offload(make("llama"), kv_memory=26000, **options) as session:
        (said,) = (sentence for sentence in session.report().fallbacks if "piece by piece" in sentence)
        assert session.report().exactness == "rounding"
    least = int(said.split("kv_memory=")[1].split()[0])
    with offload(make("llama"), kv_memory=least, **options) as session:
        assert session.report().exactness == "identical" and not session.report().fallbacks
    with offload(make("llama"), kv_memory=least - 1, **options) as session:
        assert session.report().exactness == "rounding"


@pytest.mark.parametrize("policy", ["int8", "int4", "window", "retrieve"])
def test_lossy_methods_stay_on_the_device_where_they_fit(policy):
    options = {"device": "cpu", "cpu_memory": PLENTY, "batch_size": 2, "max_tokens": 110, "kv_policy": policy}
    with offload(make("llama"), **options) as session, torch.inference_mode():
        cache = session.kv_cache()
        session.model(input_ids=tokens(2, 90), past_key_values=cache)
        for _ in range(15):
            session.model(input_ids=tokens(2, 1), past_key_values=cache)
        assert session.report().kv["peak_nvme_bytes"] == 0


def test_a_beginning_of_text_or_of_several_rows_is_refused():
    with offload(make("llama"), device="cpu", cpu_memory=PLENTY, max_tokens=100) as session:
        assert session.kv_cache(tokens(1, 5)).get_seq_length() == 5
        for wrong in ("Once upon", tokens(2, 5)):
            with pytest.raises(ConfigError, match="token ids of one prefix"):
                session.kv_cache(wrong)


def test_a_full_disk_while_pages_go_down(monkeypatch):
    """The call fails and says why; the cache is not used again; a new session works."""
    model, ids = make("llama"), tokens(2, 90)
    real = os.posix_fallocate

    def full(descriptor, offset, nbytes):
        if nbytes:
            raise OSError(errno.ENOSPC, "no space")
        return real(descriptor, offset, nbytes)

    with offload(model, device="cpu", cpu_memory=PLENTY, batch_size=2, max_tokens=101, kv_memory=24576) as session:
        cache = session.kv_cache()
        with monkeypatch.context() as patch, torch.inference_mode():
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(DiskFull, match="free some space"):
                session.model(input_ids=ids, past_key_values=cache)
            with pytest.raises(ConfigError, match="broke off"):
                session.model(input_ids=ids[:, :1], past_key_values=cache)
        with torch.inference_mode():
            assert session.model(input_ids=ids, past_key_values=session.kv_cache()).logits.isfinite().all()
    again = offload(model, device="cpu", cpu_memory=PLENTY, batch_size=2, max_tokens=101, kv_memory=24576)
    with again as session, torch.inference_mode():
        assert session.model(input_ids=ids, past_key_values=session.kv_cache()).logits.isfinite().all()


def test_a_write_that_fails_behind_is_never_read_back(monkeypatch):
    """Whenever the disk fails, the call raises: either where the failure is found, or where the page is wanted."""
    model, ids = make("llama"), tokens(2, 90)
    real = PageFile.write
    for failing in (0, 3, 11):
        written = []

        def write(self, place, memory, failing=failing, written=written):
            written.append(place)
            if len(written) - 1 == failing:
                raise DiskFull("the disk is full; free some space")
            real(self, place, memory)

        monkeypatch.setattr(PageFile, "write", write)
        session = offload(model, device="cpu", cpu_memory=PLENTY, batch_size=2, max_tokens=101, kv_memory=24576)
        with session, torch.inference_mode():
            cache = session.kv_cache()
            with pytest.raises((DiskFull, ReadError, ConfigError), match=r"full|lost"):
                session.model(input_ids=ids, past_key_values=cache)
                for _ in range(8):
                    session.model(input_ids=ids[:, :1], past_key_values=cache)
            del cache


def test_a_batch_that_a_page_is_too_small_for():
    session = offload(make("llama"), device="cpu", cpu_memory=PLENTY, max_tokens=100, kv_memory=32768)
    with session, torch.inference_mode(), pytest.raises(OffloadError, match="batch_size"):
        session.model(input_ids=tokens(64, 5), past_key_values=session.kv_cache())


def test_a_context_longer_than_was_reserved_for(monkeypatch):
    monkeypatch.setitem(METHODS, "none", Method(page_tokens=lambda total: 8))
    monkeypatch.setattr("offload.kv.demand._whole", lambda *sizes: 1 << 60)
    session = offload(make("llama"), device="cpu", cpu_memory=PLENTY, max_tokens=60, kv_memory=60000)
    with session, torch.inference_mode(), pytest.raises(OffloadError, match="max_tokens that will be used"):
        session.model(input_ids=tokens(1, 100), past_key_values=session.kv_cache())


def test_nothing_is_left_when_a_cache_is_gone():
    """Pages are free again when nobody holds a cache; a copy keeps those that it shares."""
    entered = offload(make("llama"), device="cpu", cpu_memory=PLENTY, max_tokens=120, kv_memory=49152)
    with entered as session, torch.inference_mode():
        store = session._kv.paged.store
        cache = session.kv_cache()
        session.model(input_ids=tokens(1, 100), past_key_values=cache)
        held = [layer.paged.bytes_by_tier() for layer in cache.layers]
        assert {tier: sum(layer[tier] for layer in held) for tier in Tier} == store._bytes
        logits = session.model(input_ids=tokens(1, 1), past_key_values=copy.deepcopy(cache)).logits
        twin = copy.deepcopy(cache)
        del cache
        assert sum(store._bytes.values()) > 0
        assert torch.equal(session.model(input_ids=tokens(1, 1), past_key_values=twin).logits, logits)
        del twin
        assert sum(store._bytes.values()) == 0
