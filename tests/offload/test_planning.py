"""`plan`, `probe`, `report`: planned without loading, run as planned, shown again."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import offload.probe as probe
from offload import BudgetTooSmall, ConfigError, PlanError, ProfileError, offload
from offload.cli.main import main
from offload.probe import hardware_profile, measure
from offload.scheduler.hardware import HardwareProfile, LinkRate
from offload.session.preview import Planner, PlanRequest
from offload.storage.devices.cpu import CpuDevice
from tests.architectures import BY_NAME, make, oracle_of, tokens
from tests.budgets import SOME, SPLIT, budget_for, spec_of
from tests.scheduler.machines import RTX_3060

PROFILE = str(Path(__file__).parent.parent / "described_machine.json")
SMALL = ["--device", "cpu", "--cpu-memory", "8MiB"]


@pytest.fixture
def card(tmp_path):
    path = tmp_path / "card.json"
    path.write_text(json.dumps(RTX_3060.to_dict()))
    return str(path)


def run(capsys, *arguments):
    status = main(list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


def test_a_plan_tells_where_how_fast_and_what_would_help(capsys):
    status, out, _ = run(capsys, "plan", "demo", *SMALL, "--prompt-tokens", "64", "--new-tokens", "32")
    assert status == 0
    for words in ("stay on the device", "stream from disk", "TTFT", "bound by", "what if", "MiB of CPU memory"):
        assert words in out


def test_a_plan_for_a_machine_that_one_does_not_have(capsys, card):
    options = ["--hardware", card, "--gpu-memory", "6MiB", "--cpu-memory", "1GiB", "--prompt-tokens", "64", "--json"]
    planned = json.loads(run(capsys, "plan", "demo", *options)[1])
    assert planned["plan"]["weights"]["in_host_memory"] == planned["plan"]["weights"]["streamed"]
    assert planned["peak_bytes"]["gpu"] <= 6 << 20
    assert planned["prediction"]["hardware_id"] == "described"
    assert any("bus" in item["change"] for item in planned["what_if"])


def test_more_memory_never_plans_slower(card):
    planner = Planner("demo", hardware=HardwareProfile.load(card))
    seconds = [
        planner.plan(PlanRequest(64, 64, gpu_memory=f"{size}MiB", cpu_memory="64MiB")).prediction.total_seconds(64)
        for size in (5, 6, 8, 10, 16)
    ]
    assert all(later <= 1.02 * earlier for earlier, later in zip(seconds, seconds[1:], strict=False))
    assert seconds[-1] < seconds[0]


def test_generate_runs_a_plan_from_a_file(capsys, tmp_path):
    path, report = str(tmp_path / "plan.json"), str(tmp_path / "run.json")
    assert run(capsys, "plan", "demo", *SMALL, "--prompt-tokens", "8", "--new-tokens", "8", "--output", path)[0] == 0
    plan = json.loads(Path(path).read_text())
    # An edit: one more layer is streamed.
    moved = next(key for key in plan["weights"]["resident"] if ".layers." in key)
    plan["weights"]["resident"].remove(moved)
    plan["weights"]["streamed"].append(moved)
    Path(path).write_text(json.dumps(plan))
    generate = ["generate", "demo", *SMALL, "--prompt", "In the", "--max-new-tokens", "4"]
    status, edited, _ = run(capsys, *generate, "--plan", path, "--report", report)
    assert status == 0
    assert edited == run(capsys, *generate)[1]
    blocks = json.loads(Path(report).read_text())["blocks"]
    assert blocks["streamed_from_disk"] == len(plan["weights"]["streamed"])


def test_a_plan_for_another_model_is_refused(tmp_path):
    make("gpt2").save_pretrained(tmp_path)
    plan = Planner("demo").plan(PlanRequest(8, 8)).plan
    with pytest.raises(PlanError, match="another model"):
        offload(str(tmp_path), device="cpu", plan=plan).__enter__()


def test_an_impossible_budget_names_the_least(capsys):
    status, _, err = run(capsys, "plan", "demo", "--device", "cpu", "--cpu-memory", "1KiB")
    assert status == 1
    least = int(re.search(r"\((\d+) bytes\)", err)[1])
    assert run(capsys, "plan", "demo", "--device", "cpu", "--cpu-memory", str(least))[0] == 0
    with pytest.raises(BudgetTooSmall):
        Planner("demo").plan(PlanRequest(cpu_memory=least - 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "demo", "--new-tokens", "0"], "must be at least 1"),
        (["plan", "demo", "--hardware", "/no/such.json"], "cannot be read"),
        (["plan", "demo", "--output", "/no/such/plan.json"], "cannot be written"),
        (["plan", "/no/such/model"], "no folder"),
        (["generate", "demo", "--prompt", "x", "--plan", "/no/such.json"], "cannot be read"),
        (["report", "/no/such.json"], "cannot be read"),
        (["report", "a", "b", "c"], "give one, or two"),
    ],
)
def test_a_wrong_call_gets_one_plain_line(capsys, arguments, message):
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert message in err
    assert err.startswith("offload: ")
    assert err.count("\n") == 1


def test_a_profile_of_another_kind_of_machine_is_refused(card):
    with pytest.raises(ProfileError, match="a GPU"):
        offload("demo", device="cpu", hardware=card)


def test_the_kept_profile_is_used_and_a_broken_one_refused(monkeypatch, tmp_path):
    monkeypatch.delenv("OFFLOAD_HARDWARE")
    monkeypatch.setenv("OFFLOAD_PROFILES", str(tmp_path / "kept"))
    measured = []

    def measure_once(device, folder, progress):
        measured.append(folder)
        return replace(HardwareProfile.load(PROFILE), hardware_id=probe.hardware_id(device, folder))

    monkeypatch.setattr(probe, "measure", measure_once)
    first = hardware_profile(CpuDevice(), str(tmp_path))
    assert hardware_profile(CpuDevice(), str(tmp_path)) == first
    assert len(measured) == 1
    hardware_profile(CpuDevice(), str(tmp_path), refresh=True)
    assert len(measured) == 2
    (kept,) = (tmp_path / "kept").iterdir()
    kept.write_text(kept.read_text().replace(first.hardware_id, "another"))
    with pytest.raises(ProfileError, match="other hardware"):
        hardware_profile(CpuDevice(), str(tmp_path))
    kept.write_text("{")
    with pytest.raises(ProfileError):
        hardware_profile(CpuDevice(), str(tmp_path))


def test_a_machine_that_cannot_be_measured_still_generates(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("OFFLOAD_HARDWARE")
    monkeypatch.setenv("OFFLOAD_PROFILES", str(tmp_path))

    def refuse(*args):
        raise ProfileError("the disk is full")

    monkeypatch.setattr(probe, "measure", refuse)
    status, out, err = run(capsys, "generate", "demo", "--prompt", "In the", "--max-new-tokens", "2", *SMALL)
    assert status == 0
    assert out.strip()
    assert "nothing is predicted: the disk is full" in err
    assert "predicted: prefill" not in err


def test_everything_is_measured(tmp_path, monkeypatch):
    """With little of everything, to be quick: that all of it is there and sound, not how fast this machine is."""
    for name, value in {
        "_MATRIX_EDGE": 128,
        "_WEIGHTS_BYTES": 1 << 20,
        "_MEMORY_BYTES": 1 << 20,
        "_POINT_SECONDS": 0.001,
    }.items():
        monkeypatch.setattr(probe, name, value)
    monkeypatch.setattr(probe, "_DISK_BYTES", 64 << 20)
    steps = []
    profile = measure(CpuDevice(), str(tmp_path), lambda what, done, total: steps.append((done, total)))
    assert HardwareProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile
    assert profile.device is None
    assert steps[-1][0] == steps[-1][1]
    assert not list(tmp_path.iterdir())


def test_the_report_predicts_and_its_causes_add_up(tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path)
    budget = budget_for(spec_of(str(tmp_path)), SOME, 2, 24)
    with offload(str(tmp_path), device="cpu", cpu_memory=budget, batch_size=2, max_tokens=24) as session:
        session.model.generate(input_ids=tokens(), max_new_tokens=8, do_sample=False)
        report, trace = session.report(), session.trace()
    assert report.prediction is not None
    assert report.prediction.exact_work
    assert sum(report.prediction.decode_shares.values()) == pytest.approx(1)
    for phase in (report.prefill, report.decode):
        causes = phase.compute_seconds + phase.overhead_seconds + sum(phase.wait_seconds.values()) + phase.other_seconds
        assert causes == pytest.approx(phase.seconds, rel=0.01)
    assert len(trace.passes("decode")) == 7
    assert sum(span.nbytes for span in trace.on("disk")) == report.links["disk"].bytes
    assert sum(trace.attribution("decode").values()) == pytest.approx(report.decode.seconds, rel=0.01)


def test_a_run_is_kept_shown_again_and_compared(capsys, tmp_path):
    first, second, page = (str(tmp_path / name) for name in ("a.json", "b.json", "run.html"))
    generate = ["generate", "demo", "--prompt", "In the <b>", "--max-new-tokens", "4", "--device", "cpu", "--quiet"]
    trace = str(tmp_path / "trace.json")
    assert run(capsys, *generate, "--cpu-memory", "8MiB", "--report", first, "--trace", trace)[0] == 0
    assert run(capsys, *generate, "--report", second)[0] == 0
    assert "exactness identical" in run(capsys, "report", first)[1]
    compared = run(capsys, "report", first, second)[1]
    assert "a token" in compared
    assert "second / first" in compared
    assert run(capsys, "report", first, "--output", page)[0] == 0
    content = Path(page).read_text()
    assert not re.search(r"https?:|src=|href=|@import|url\(|<script", content)
    for heading in ("Where the time went", "Links", "Memory over time", "Predicted and measured", "What would help"):
        assert heading in content
    events = json.loads(Path(trace).read_text())["traceEvents"]
    tracks = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert tracks >= {"pass", "compute", "disk"}
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")


def test_a_file_that_is_no_run_is_refused(tmp_path, capsys):
    path = tmp_path / "run.json"
    for content in ("{", "[]", '{"model": "x"}'):
        path.write_text(content)
        assert "is no run" in run(capsys, "report", str(path))[2]


def test_activations_that_are_only_estimated_are_reported():
    for name, told in (("t5", True), ("llama", False)):
        with offload(make(name), device="cpu", cpu_memory="64MiB") as session:
            assert any("activations are estimated" in sentence for sentence in session.report().fallbacks) == told


def test_the_model_is_as_it_was_after_it_was_looked_at():
    model = make("llama")
    wanted = oracle_of(model)(**BY_NAME["llama"].inputs()).logits
    with offload(model, device="cpu", cpu_memory="64MiB", hardware=PROFILE) as session:
        session.model(**BY_NAME["llama"].inputs())
        assert session.report().prediction is not None
    assert torch.equal(model(**BY_NAME["llama"].inputs()).logits, wanted)
    with pytest.raises(ConfigError):
        PlanRequest(batch_size=0)


def test_the_peak_of_memory_is_predicted_and_excess_is_told(tmp_path, monkeypatch):
    model = make("llama")
    model.save_pretrained(tmp_path)
    held = [10 << 20]
    monkeypatch.setattr("offload.session.session.process_bytes", lambda: held[0])
    monkeypatch.setattr("offload.runtime.meters.process_bytes", lambda: held[0])
    with offload(str(tmp_path), device="cpu", cpu_memory="1MiB", max_tokens=24) as session:
        assert session.report().peak.measured_bytes is None
        held[0] += 5 << 20
        session.model(tokens())
        peak = session.report().peak
        assert peak.measured_bytes == 5 << 20
        assert session.plan.device_bytes < peak.predicted_bytes < session.plan.device_bytes + (16 << 20)
        assert not any("than predicted" in sentence for sentence in session.report().fallbacks)
        held[0] += 100 << 20
        session.model(tokens())
        assert any("more memory was held than predicted" in sentence for sentence in session.report().fallbacks)


def test_tracing_is_told_and_small(tmp_path):
    model = make("llama")
    with offload(model, device="cpu", cpu_memory="1MiB", batch_size=2, max_tokens=24) as session:
        model.generate(input_ids=tokens(), max_new_tokens=8, do_sample=False)
        report = session.report()
        noted = len(session.trace().spans) + len(session.trace().memory)
    assert report.tracing["spans"] == noted
    assert report.tracing["dropped"] == 0
    assert 0 < report.tracing["seconds"] < noted * 1e-4


def test_parts_of_blocks_leave_nothing_unnamed(tmp_path):
    """Attention runs between the windows of a layer that is taken apart: it is that layer's compute."""
    model = make("llama")
    model.save_pretrained(tmp_path)
    reserve = {"batch_size": 2, "max_tokens": 24}
    budget = budget_for(spec_of(str(tmp_path), **reserve), SPLIT, 2, 24)
    with offload(str(tmp_path), device="cpu", cpu_memory=budget, **reserve) as session:
        session.model.generate(input_ids=tokens(), max_new_tokens=8, do_sample=False)
        assert session._parts.residency.by_submodule
        spans = {span.name for span in session.trace().on("compute")}
    assert session._parts.residency.by_submodule.keys <= spans
    assert any(name.startswith(f"{next(iter(session._parts.residency.by_submodule.keys))}.") for name in spans)


def test_rounding_takes_a_batch_apart_where_more_stays_so():
    """On a slow disk, layers that stay are worth more than one product for the whole batch."""
    model = make("llama")
    reserve = {"batch_size": 32, "max_tokens": 100, "new_tokens": 20}
    spec = spec_of(model, **reserve)
    slow = replace(HardwareProfile.load(PROFILE), disk_read=LinkRate(1e6))
    budget = budget_for(spec, SOME, 32, 100)
    with offload(model, device="cpu", cpu_memory=budget, hardware=slow, exactness="rounding", **reserve) as session:
        assert session.plan.splits.micro_batch or session.plan.splits.prefill_chunk
        rounding = len(session.plan.weights.resident)
        assert session.report().exactness == "rounding"
    with offload(model, device="cpu", cpu_memory=budget, hardware=slow, **reserve) as session:
        assert not session.plan.rounds
        assert len(session.plan.weights.resident) < rounding
