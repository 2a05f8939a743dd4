"""Every class of experts that transformers decorates, with few slots, some, and one for each expert: the plain model's bits."""

import copy

import pytest
import torch

from offload import offload
from offload.budgets import Budgets
from offload.model.blocks import estimated_size
from offload.model.experts import find_experts
from offload.planning.describe import count_activations, takes_tokens
from offload.planning.fit import Demand, ExpertGranularity, fit
from offload.scheduler.model_spec import Workload
from tests.architectures import oracle_of
from tests.expert_models import decorated, make_model
from tests.plans import edited
from tests.poison import DiskMeter, poison_homes

BATCH, TOKENS = 3, 24


def plan_for(model, slots):
    """Everything on the device but experts, which share so many slots."""
    workload = Workload(BATCH, TOKENS, TOKENS)
    temporaries = count_activations(model, workload) if takes_tokens(model) else None
    budgets = Budgets(1 << 34, None)
    plan = fit(model, budgets, workload, estimated_size, temporaries, Demand(ExpertGranularity.PER_EXPERT)).plan
    return edited(plan, "experts", slots=min(slots, plan.experts.slots))


def levels(model):
    """As many slots as a token needs in a layer, half of the experts, and all."""
    units = find_experts(model)
    total = sum(unit.count for unit in units)
    return sorted({2, max(2, total // 2), total})


def prompt(rows=2, length=7):
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(3))


def check(found, wanted, what):
    assert torch.equal(found, wanted), f"{what}: {(found - wanted).abs().max()} apart"


def test_most_classes_are_tested_in_whole_models():
    whole = sum(make_model(name, torch.float32)[1] for name in decorated())
    assert len(decorated()) >= 55
    assert whole >= 40, f"{whole} of {len(decorated())}"


def skip_unless_plain_runs(model):
    """Some releases of transformers cannot run a model of theirs in bf16."""
    try:
        with torch.no_grad():
            model(prompt())
    except RuntimeError as error:
        pytest.skip(f"the plain {type(model).__name__} fails by itself in {model.dtype}: {error}")


def logits(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("experts", sorted(decorated()))
def test_the_bits_of_the_plain_model(experts, dtype, tmp_path):
    model, whole = make_model(experts, dtype)
    folder = tmp_path / "model"
    if whole:
        model.save_pretrained(folder)
        model = type(model).from_pretrained(folder, dtype=dtype).eval()
        skip_unless_plain_runs(model)
    twin = oracle_of(model)
    for slots in levels(model):
        target = str(folder) if whole else make_model(experts, dtype)[0]
        options = {"device": "cpu", "batch_size": BATCH, "max_tokens": TOKENS, "disk_dir": tmp_path, "expert_prefetch": "off"}
        with offload(target, plan=plan_for(model, slots), **options) as session, torch.no_grad():
            assert poison_homes(session)
            meter = DiskMeter(session)
            for rows in (1, BATCH):
                ids = prompt(rows)
                check(logits(session.model(ids)), logits(twin(ids)), f"prefill of {rows}, {slots} slots")
            if whole:
                decode(session.model, twin, slots)
            else:
                one = prompt(1, 1)
                check(logits(session.model(one)), logits(twin(one)), f"one token, {slots} slots")
            tallies = session._parts.components["experts"].tally.layers
            assert all(tally.choices - tally.hits == tally.copies for tally in tallies)
            assert all(
                tally.copied_bytes == tally.copies * unit.nbytes
                for tally, unit in zip(tallies, find_experts(model), strict=True)
            )
            assert meter.nbytes == sum(tally.copied_bytes for tally in tallies)
            assert session.plan.experts.slots == slots
            assert session.plan.weights.streamed == ()


def decode(model, twin, slots):
    """New tokens one by one, each from the plain model's own cache."""
    for rows in (BATCH, 1):
        cache = getattr(twin(prompt(rows), use_cache=True), "past_key_values", None)
        for step in range(3):
            token = prompt(rows, 3)[:, step : step + 1]
            mine = copy.deepcopy(cache)
            wanted = twin(token, past_key_values=cache, use_cache=True)[0]
            found = model(token, past_key_values=mine, use_cache=True)[0]
            check(found, wanted, f"decode of {rows}, {slots} slots")
