"""Why the oracle is a clone: an address can change bits, and slots never lie at such an address."""

import pytest
import torch

from offload import offload
from tests.architectures import make, oracle_of, tokens
from tests.budgets import NONE, budget_for, spec_of


def at_address(values: torch.Tensor, remainder: int) -> torch.Tensor:
    """A copy of `values` (fp32) that starts at `remainder` modulo 16."""
    room = torch.empty(values.numel() + 16)
    start = next(index for index in range(16) if (room.data_ptr() + 4 * index) % 16 == remainder)
    return room[start : start + values.numel()].view_as(values).copy_(values)


def test_an_address_of_8_modulo_16_may_change_bits():
    """Shows the effect where this CPU has it; the values agree to rounding everywhere."""
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for rows, columns in ((96, 32), (64, 48), (512, 130), (1000, 257)):
        weight = torch.randn(rows, columns, generator=generator)
        vector = torch.randn(1, columns, generator=generator)
        aligned = torch.nn.functional.linear(vector, at_address(weight, 0))
        shifted = torch.nn.functional.linear(vector, at_address(weight, 8))
        assert torch.allclose(aligned, shifted, rtol=1e-4, atol=1e-4)
        assert torch.equal(aligned, torch.nn.functional.linear(vector, weight.clone())), "aligned memory is one thing"
        largest = max(largest, float((aligned - shifted).abs().max()))
    if not largest:
        pytest.skip("on this CPU the kernels give the same bits at both addresses")
    assert largest < 1e-3


def test_every_weight_in_use_is_aligned(tmp_path):
    """Also where the file's own addresses are not: the output is the aligned model's."""
    model = make("llama", True)
    model.config.note = "x" * 5  # another length of header, another remainder
    model.save_pretrained(tmp_path)
    seen = set()
    budget = budget_for(spec_of(str(tmp_path)), NONE, 2, 16)
    with offload(tmp_path, device="cpu", cpu_memory=budget, batch_size=2, max_tokens=16) as session:

        def note(module, args):
            seen.update(value.data_ptr() % 256 for value in module.parameters(recurse=False))

        for name, module in session.model.named_modules():
            if "layers." in name:
                module.register_forward_pre_hook(note)
        logits = session.model(input_ids=tokens()).logits
    assert seen == {0}
    assert torch.equal(logits, oracle_of(model)(input_ids=tokens()).logits)
