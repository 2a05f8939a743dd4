"""What stops the host in a pass, beyond what stops it in the plain model's: counted on the pretended card, by place."""

import pytest
import torch

from offload import Training, offload
from offload.model.experts import find_experts
from tests.architectures import make, tokens
from tests.gpu.test_overlap import TOKENS, decoding, model, streamed
from tests.gpu.timed import waits_of
from tests.offload.test_experts import beside

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

END_OF_PASS = "offload/runtime/passes.py"
"""A pass returns when its compute is over, and what was prefetched goes on."""


def by_place(waits):
    """Where in the package, without lines; what the CPU's own kernels ask of the pretended card is left out."""
    found = {}
    for (_, place), count in waits.items():
        file, _, function = place.partition(":")
        if not file.startswith("tests/") and "_call" not in function:
            found[file] = found.get(file, 0) + count
    return found


def test_the_plain_model_waits_for_nothing(card):
    class Plain:
        model = model().cuda()

    with torch.inference_mode():
        assert not by_place(waits_of(card, decoding(Plain)))


def test_streaming_from_cpu_memory(card):
    with streamed(model()) as session, torch.inference_mode():
        assert session.plan.weights.streamed
        assert not session.plan.weights.row_fetched
        assert by_place(waits_of(card, decoding(session))) == {END_OF_PASS: 1}


def test_looked_up_rows(card):
    with streamed(model(), spare_blocks=1) as session, torch.inference_mode():
        assert session.plan.weights.row_fetched
        waits = by_place(waits_of(card, decoding(session)))
        assert waits == {END_OF_PASS: 1, "offload/runtime/embedding_rows.py": 1}


def test_experts(card, tmp_path):
    plain = make("mixtral")
    plain.save_pretrained(tmp_path / "model")
    layers = find_experts(plain)
    total = sum(unit.count for unit in layers)
    options = {"gpu_memory": 1 << 30, "cpu_memory": 1 << 30, "batch_size": 2, "max_tokens": 40}
    with (
        offload(tmp_path / "model", device="cuda", plan=beside(plain, total // 2, total), **options) as session,
        torch.inference_mode(),
    ):
        waits = by_place(waits_of(card, decoding(session)))
    assert waits == {END_OF_PASS: 1, "offload/moe/streaming.py": len(layers)}


@pytest.mark.parametrize(("policy", "a_layer"), [("none", 0), ("retrieve", 1)])
def test_kv_pages(policy, a_layer, card):
    """Which pages a query wants is known on the card; which are to be brought must be known on the host."""
    length, layers = 1008, 4
    options = {"max_tokens": length + 32, "kv_memory": length * layers * 2 * 2 * 16 * 4 // 2}
    if policy != "none":
        options |= {"kv_policy": policy, "kv_budget": "256"}
    with (
        offload(model(layers), device="cuda", gpu_memory="64MiB", cpu_memory="1GiB", **options) as session,
        torch.inference_mode(),
    ):
        cache, ids = session.kv_cache(), tokens(1, 9).cuda()
        session.model(ids.repeat(1, length // 9), past_key_values=cache, use_cache=True)

        def step():
            session.model(ids[:, :1], past_key_values=cache, use_cache=True)

        step(), step()
        waits = by_place(waits_of(card, step))
        assert session._kv.paged.onloaded_bytes
    assert waits == {END_OF_PASS: 1} | ({"offload/kv/policies/retrieve.py": layers} if a_layer else {})


@pytest.mark.parametrize("full", [False, True])
def test_training(full, card):
    """A step: the loss, the norm, and in full training the table's gradient and what is loaded ahead of an update."""
    from peft import LoraConfig, get_peft_model

    plain = model()
    ids = tokens(1, 32).cuda()
    options = {"batch_size": 1, "max_tokens": TOKENS, "training": Training(full=full), "spare_blocks": 6}
    with streamed_for_training(plain, **options) as session:
        adapters = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        trained = session.model if full else get_peft_model(session.model, adapters).train()

        def step():
            session.backward([lambda: trained(input_ids=ids, labels=ids, use_cache=False).loss])
            session.step(1.0, overlap=True)

        step(), step()
        waits = by_place(waits_of(card, step))
    # The adder's thread waits for copies instead.
    waits.pop("offload/training/backward/gradient_transfer.py", None)
    expected = {END_OF_PASS: 2, "offload/training/component.py": 1}
    if not full:
        expected["offload/training/optimizer/streamed_optimizer.py"] = 1
    assert {place: count for place, count in waits.items() if place in expected} == expected
    assert sum(waits.values()) <= (8 if full else 5), waits


def streamed_for_training(plain, spare_blocks, **options):
    from tests.budgets import NONE, budget_for, spec_of

    spec = spec_of(plain, batch_size=1, max_tokens=TOKENS)
    largest = max(block.slot_bytes for block in spec.blocks)
    budget = budget_for(spec, NONE, 1, TOKENS, "cuda") + spare_blocks * largest
    return offload(plain, device="cuda", gpu_memory=budget, cpu_memory="1GiB", **options)
