"""Files of earlier versions are read: reports, plans and profiles of schema 1."""

import json
from pathlib import Path

import pytest

from offload import PlanError, offload
from offload.cli.main import main
from offload.report.record import Record
from offload.report.report import Report
from offload.scheduler.hardware import HardwareProfile
from offload.scheduler.plan import Plan
from tests.architectures import make

FOLDER = Path(__file__).parent.parent / "schema_1"


def test_an_old_report_is_read_and_shown(capsys, tmp_path):
    report = Report.from_dict(Record.load(str(FOLDER / "run.json")).report)
    assert report.schema == 2
    assert report.blocks["row_fetched"] == 0
    assert report.kv["onloaded_bytes"] == 8192
    assert (report.kv["full_pages"], report.kv["unquantized_pages"]) == (5, 1)
    assert report.experts.belady == {"choices": 10, "measured_hits": 6, "hits": 8, "whole_run": True}
    assert report.training.eval_losses == [[1, 2.5]]
    assert (report.training.estimate.activation_bytes, report.training.estimate.activation_tier) == (64, "recompute")
    assert report.decode.overhead_seconds > 0
    page = tmp_path / "page.html"
    assert main(["report", str(FOLDER / "run.json"), "--output", str(page)]) == 0
    assert "<svg" in page.read_text()
    assert main(["report", str(FOLDER / "run.json")]) == 0
    assert "decode" in capsys.readouterr().out


def test_a_report_says_its_schema_and_goes_both_ways():
    with offload(make("llama"), device="cpu", cpu_memory="1MiB") as session:
        report = session.report()
    content = json.loads(report.to_json())
    assert content["schema"] == 2
    assert Report.from_dict(content) == report
    with pytest.raises(ValueError, match="schema 3"):
        Report.from_dict(content | {"schema": 3})


def test_an_old_plan_is_read_and_run():
    text = (FOLDER / "plan.json").read_text()
    plan, old = Plan.from_json(text), json.loads(text)
    assert list(plan.weights.resident) == old["resident"]
    assert plan.weights.always_resident_bytes == old["pinned_bytes"]
    assert (plan.kv.reserved_bytes, plan.kv.segments) == (old["kv_bytes"], False)
    with offload("demo", device="cpu", cpu_memory="6MiB", max_tokens=16, plan=plan) as session:
        assert session.plan.weights.resident == plan.weights.resident
        # What it says of blocks is made anew.
        blocks = {block.key: block for block in session.plan.weights.blocks}
        assert set(blocks) == {*plan.weights.resident, *plan.weights.streamed}
        assert all(block.codec == "none" and block.decode_seconds == 0 for block in blocks.values())
        written = json.loads(session.plan.to_json())
    assert written["schema"] == 2
    assert set(written["weights"]["blocks"][0]) == {
        *("key", "stored_bytes", "host_bytes", "slot_bytes", "resident_bytes", "codec", "decode_seconds")
    }
    with pytest.raises(PlanError, match="schema 3"):
        Plan.from_json(json.dumps(written | {"schema": 3}))


def test_old_names_answer_with_a_warning():
    plan = Plan.from_json((FOLDER / "plan.json").read_text())
    with pytest.warns(DeprecationWarning, match=r"Plan.kv_bytes is deprecated: use Plan.kv.reserved_bytes"):
        assert plan.kv_bytes == plan.kv.reserved_bytes
    with pytest.raises(AttributeError):
        _ = plan.kv_byte
    with offload(make("llama"), device="cpu", cpu_memory="1MiB") as session:
        report = session.report()
        with pytest.warns(DeprecationWarning, match="use Session.training_estimate"):
            assert session.outlook == session.training_estimate
    with pytest.warns(DeprecationWarning, match="standalone"):
        assert report.outside is report.standalone
    with pytest.warns(DeprecationWarning, match="overhead_seconds"):
        assert report.decode.own_seconds == report.decode.overhead_seconds


def test_an_old_profile_is_read():
    path = Path(__file__).parent.parent / "described_machine.json"
    content = json.loads(path.read_text())
    seconds = content.pop("module_seconds", content.pop("window_seconds", 1e-4))
    assert HardwareProfile.from_dict(content | {"window_seconds": seconds}).module_seconds == seconds


def test_a_plan_from_before_tables_were_in_memory_is_read():
    with offload(make("llama"), device="cpu", cpu_memory="1MiB") as session:
        plan = session.plan
    content = json.loads(plan.to_json())
    del content["weights"]["tables_in_host_memory"]
    assert Plan.from_json(json.dumps(content)) == plan
    del content["weights"]["slot_bytes"]
    with pytest.raises(PlanError, match="lacks slot_bytes"):
        Plan.from_json(json.dumps(content))
