"""What sessions and reports show of themselves."""

import re

import pytest
import torch

from offload import offload
from offload.cli.main import main
from offload.errors import SessionError
from offload.report.facts import bytes_error, seconds_error


def test_a_session_says_what_it_is_before_inside_and_after():
    session = offload("demo", device="cpu", cpu_memory="8MiB", max_tokens=32)
    assert repr(session) == "<Session, not entered yet>"
    assert "not entered yet" in session._repr_html_()
    for use in (lambda: session.model, session.report, lambda: session.plan, session.trace, session.kv_cache):
        with pytest.raises(SessionError, match=r"enter (it|the session) first"):
            use()
    with session:
        session.model(torch.arange(3, 20)[None])
        assert repr(session).startswith("<Session of LlamaForCausalLM on cpu: ")
        assert repr(session).endswith("streamed>")
        page = session._repr_html_()
    assert repr(session).endswith("streamed, left>")
    assert "<pre>speed: " in page
    assert "exactness identical" in page


def test_the_summary_has_three_lines_and_the_fallbacks(capsys):
    call = ["generate", "demo", "--prompt", "And the king", "--max-new-tokens", "4", "--device", "cpu", "--cpu-memory", "8MiB"]
    assert main(call) == 0
    short = capsys.readouterr().err.strip().splitlines()
    assert [line.split(":")[0] for line in short] == ["speed", "memory", "bound by"]
    assert short[0].endswith("; exactness identical")
    assert "streamed a pass" in short[1]
    assert main([*call, "--kv-policy", "int8"]) == 0
    assert "exactness lossy: KV cache int8" in capsys.readouterr().err
    assert main([*call, "--verbose"]) == 0
    assert "unaccounted" in capsys.readouterr().err


def test_the_demo_falls_back_to_nothing_and_shows_no_error_in_percent(capsys):
    assert main(["generate", "demo", "--prompt", "And the king", "--max-new-tokens", "4", "--device", "cpu", "--verbose"]) == 0
    error = capsys.readouterr().err
    assert "fell back" not in error
    assert not re.search(r"[+-]\d+%", error)


def test_errors_of_little_are_not_shown():
    assert seconds_error(0.5, 0.05, 1.0) == bytes_error(70 << 20, 5 << 20) == seconds_error(None, 1.0) == ""
    assert seconds_error(0.5, 0.5, 0.6) == "+50%"
    assert bytes_error(110 << 20, 100 << 20) == "+10%"


def test_a_session_writes_its_report(tmp_path, capsys):
    with offload("demo", device="cpu", cpu_memory="6MiB", max_tokens=32) as session, torch.no_grad():
        session.model(torch.arange(8)[None])
        for name in ("page.html", "one.json", "two.json"):
            session.write_report(tmp_path / name)
    assert "<title>demo on cpu" in (tmp_path / "page.html").read_text()
    assert main(["report", str(tmp_path / "one.json"), str(tmp_path / "two.json")]) == 0
    compared = capsys.readouterr().out
    assert "identical" in compared
    assert "6.0 MiB" in compared
    assert main(["report", str(tmp_path / "page.html")]) == 1
    assert "is a page; give the JSON" in capsys.readouterr().err
