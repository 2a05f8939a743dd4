"""Single experts on a real card: slots filled by copies, grouped products over slots, misses computed on the CPU."""

import pytest
import torch

from offload import offload
from offload.model.experts import find_experts
from tests.architectures import make, oracle_of, tokens
from tests.offload.test_experts import beside
from tests.poison import poison_homes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]

NAMES = ["mixtral", "qwen3_moe", "gpt_oss"]
OPTIONS = {"device": "cuda", "gpu_memory": 1 << 30, "cpu_memory": 1 << 30, "batch_size": 2, "max_tokens": 40}


@pytest.mark.parametrize("in_host", [0, 7, 16])
@pytest.mark.parametrize("slots", [2, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_identical(name, dtype, slots, in_host, tmp_path):
    model = make(name, dtype=dtype)
    model.save_pretrained(tmp_path / "model")
    twin = oracle_of(model).to("cuda")
    total = sum(unit.count for unit in find_experts(model))
    plan = beside(model, min(slots, total), min(in_host, total))
    ids = tokens().to("cuda")
    with offload(tmp_path / "model", plan=plan, **OPTIONS) as session, torch.no_grad():
        poison_homes(session)
        for _ in range(3):
            assert torch.equal(session.model(ids).logits, twin(ids).logits)
        wanted = twin.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(session.model.generate(ids, max_new_tokens=8, do_sample=False), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_misses_on_the_cpu(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "model")
    twin = oracle_of(model).to("cuda")
    plan = beside(model, 4, sum(unit.count for unit in find_experts(model)))
    ids = tokens().to("cuda")
    with offload(tmp_path / "model", plan=plan, expert_misses="cpu", **OPTIONS) as session, torch.no_grad():
        found, wanted = session.model(ids).logits, twin(ids).logits
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
        assert session.report().experts.computed_on_cpu > 0
