"""A paged KV cache on a real card: copies on their own streams, page-locked pages, pieces computed on the card and by the CPU."""

import pytest
import torch

from offload import offload
from offload.kv.options import METHODS, Method
from offload.scheduler.model_spec import Workload
from tests.architectures import make, oracle_of, tokens
from tests.offload.test_kv import BATCH, MAX_TOKENS, PAGE_TOKENS, PLENTY, memory_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]

PAGES_ON_HOST = {"cpu": 4000, "disk": 0, "both": 12}


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setitem(METHODS, "none", Method(page_tokens=lambda total: PAGE_TOKENS))
    monkeypatch.setattr("offload.kv.demand._whole", lambda *sizes: 1 << 60)


def options_for(model, placement, segments, monkeypatch, host):
    monkeypatch.setattr(Workload, "kv_host_bytes", lambda self, spec, host_bytes: PAGES_ON_HOST[host] * 4096)
    heads = model.config.num_key_value_heads if hasattr(model.config, "num_key_value_heads") else 4
    token_bytes = heads * 8 * 2 * next(model.parameters()).element_size()
    assembled = 0 if segments else BATCH * MAX_TOKENS * token_bytes
    page_bytes = -(-BATCH * PAGE_TOKENS * token_bytes // 4096) * 4096
    memory = memory_for(assembled, 4, page_bytes, placement)
    exactness = {"exactness": "rounding"} if segments else {}
    sizes = {"gpu_memory": PLENTY, "cpu_memory": PLENTY, "batch_size": BATCH, "max_tokens": MAX_TOKENS}
    return {"device": "cuda", "kv_memory": memory, **sizes, **exactness}


@pytest.mark.parametrize("host", list(PAGES_ON_HOST))
@pytest.mark.parametrize("placement", ["below", "across"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_identical(name, dtype, placement, host, monkeypatch):
    model = make(name, dtype=dtype)
    twin = oracle_of(model).to("cuda")
    ids = tokens(2, 11).to("cuda")
    ways = [{}, {"num_beams": 3}]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False}
    with torch.inference_mode():
        expected = [twin.generate(**given, **way) for way in ways]
        with offload(model, **options_for(model, placement, False, monkeypatch, host)) as session:
            for way, theirs in zip(ways, expected, strict=True):
                assert torch.equal(session.model.generate(**given, **way), theirs)
            assert session.report().kv["onloaded_bytes"] > 0


@pytest.mark.parametrize("beside", [False, True])
def test_tokens_are_equal_in_pieces(beside, monkeypatch):
    monkeypatch.setattr("offload.kv.paged_cache.cpu_reads_pages", lambda hardware: beside)
    model = make("llama")
    twin = oracle_of(model).to("cuda")
    ids = tokens(2, 11).to("cuda")
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False}
    with torch.inference_mode():
        expected = twin.generate(**given)
        with offload(model, **options_for(model, "below", True, monkeypatch, "cpu")) as session:
            assert torch.equal(session.model.generate(**given), expected)
            assert (session.report().kv["onloaded_bytes"] == 0) == beside


@pytest.mark.parametrize("policy", ["int8", "int4", "window", "retrieve"])
def test_lossy_methods_run(policy):
    model = make("llama")
    ids = tokens(2, 30).to("cuda")
    options = {"device": "cuda", "gpu_memory": PLENTY, "batch_size": 2, "max_tokens": 100, "kv_policy": policy}
    with offload(model, **options) as session, torch.inference_mode():
        output = session.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
        assert output.shape == (2, 60) or output.shape[1] <= 60
        assert session.report().exactness.startswith("lossy")
