"""`offload plan --train`: what a session says of the same training, without loading the model."""

import json
from dataclasses import asdict

import pytest

from offload import Training, offload
from offload.adapters.peft import with_adapters
from offload.cli.main import main
from offload.errors import BudgetTooSmall
from offload.session.preview import Planner, PlanRequest

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

BUDGETS = {"lora": "32MiB", "full": "160MiB"}


@pytest.mark.parametrize("state_tier", ["cpu", "nvme"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_is_what_the_session_says(method, state_tier, tmp_path):
    training = Training(full=method == "full", state_tier=state_tier, state_dir=str(tmp_path))
    asked = PlanRequest(64, 1, 2, cpu_memory=BUDGETS[method])
    planned = Planner("demo", device="cpu").plan_training(asked, training, rank=8)
    options = {"device": "cpu", "cpu_memory": BUDGETS[method], "batch_size": 2, "max_tokens": 64}
    with offload("demo", training=training, **options) as session:
        if method == "lora":
            with_adapters(session.model, rank=8)
        real = session.training_estimate()
        peak = session.report().tiers["cpu"].peak_bytes
    mine, theirs = asdict(planned.estimate), asdict(real)
    for facts in (mine, theirs):
        # A second version is written beside the first, and regions are cut at parameters: of adapters one here, two there.
        for name in ("disk_bytes", "written_bytes", "state_bytes", "step_seconds") if method == "lora" else ("step_seconds",):
            facts.pop(name)
    assert mine == theirs
    assert planned.estimate.step_seconds == pytest.approx(real.step_seconds, rel=0.3)
    assert planned.estimate.state_bytes == pytest.approx(real.state_bytes, rel=0.05)
    assert peak <= planned.budget_bytes["cpu"]
    assert 0.5 * peak <= planned.peak_bytes["cpu"] <= planned.budget_bytes["cpu"]


def test_the_command(capsys):
    asked = ["plan", "demo", "--device", "cpu", "--cpu-memory", "32MiB", "--prompt-tokens", "64", "--train", "lora"]
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert "a step of lora on 1 sequence of 64 tokens" in told
    assert "523,264 parameters are trained" in told
    assert main([*asked, "--weights", "nf4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["estimate"]["trained"] == 523_264


def test_the_budget_that_is_named_would_do():
    asked, training = PlanRequest(64, 1, cpu_memory="12MiB"), Training()
    planner = Planner("demo", device="cpu")
    with pytest.raises(BudgetTooSmall, match="adapters and what steps them take") as refused:
        planner.plan_training(asked, training, rank=32)
    enough = PlanRequest(64, 1, cpu_memory=refused.value.least_bytes)
    assert planner.plan_training(enough, training, rank=32).peak_bytes["cpu"] <= refused.value.least_bytes
