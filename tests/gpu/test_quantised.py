"""On a CUDA card: checkpoints that are streamed in their small form give what the plain model with the decoded weights gives."""

import pytest
import torch
import transformers as hf

from offload import offload
from offload.planning.fit import decode_workspace_bytes
from tests.budgets import NONE, SOME, budget_for, spec_of
from tests.fp8_files import in_eight_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card"),
]

TOKENS = torch.arange(3, 19).view(2, 8)


def fp8(folder):
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
    hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=2)).bfloat16().save_pretrained(folder)
    in_eight_bits(folder)
    return str(folder), hf.AutoModelForCausalLM.from_pretrained(folder).eval()


def gguf(folder):
    pytest.importorskip("gguf")
    from tests.gguf_files import plainly_read, write_gguf

    path = write_gguf(folder / "model.gguf", "llama", ["Q4_K", "Q8_0", "Q6_K", "Q4_0", "F16"])
    return path, plainly_read(path, "llama", torch.bfloat16)


@pytest.mark.parametrize("host", ["from disk", "from CPU memory"])
@pytest.mark.parametrize("residency", [NONE, SOME])
@pytest.mark.parametrize("form", [fp8, gguf], ids=lambda form: form.__name__)
def test_identical(form, residency, host, tmp_path):
    path, model = form(tmp_path)
    spec = spec_of(path, batch_size=2, max_tokens=24)
    plain = hf.AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16).eval()
    plain.load_state_dict(model.state_dict())
    plain = plain.to("cuda")
    largest = max(block.slot_bytes for block in spec.blocks)
    options = {
        "gpu_memory": budget_for(spec, residency, 2, 24, "cuda") + (1 << 20) + decode_workspace_bytes(spec),
        "cpu_memory": {"from disk": 2, "from CPU memory": 1000}[host] * largest,
        "batch_size": 2,
        "max_tokens": 24,
    }
    with torch.no_grad(), offload(path, device="cuda", **options) as session:
        ids = TOKENS.to("cuda")
        assert session.plan.weights.streamed
        crossed = []
        for _ in range(3):
            assert torch.equal(session.model(ids).logits, plain(ids).logits)
            torch.cuda.synchronize()
            crossed.append(session.report().links["h2d"].bytes)
        blocks = {block.key: block for block in spec.blocks}
        streamed = session.plan.weights.streamed
        # Over the bus goes what the checkpoint holds.
        assert crossed[2] - crossed[1] <= 1.02 * sum(blocks[key].encoded_bytes for key in streamed)
        assert sum(blocks[key].encoded_bytes for key in streamed) < 0.8 * sum(blocks[key].slot_bytes for key in streamed)
        asked = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(session.model.generate(ids, **asked), plain.generate(ids, **asked))
