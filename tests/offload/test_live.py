"""The view of a run as it goes."""

import os
import pty
import re
import sys
from io import StringIO

from rich.console import Console

from offload import offload
from offload.cli.main import main
from offload.generation.text import Completion
from offload.report.live import LiveView
from tests.architectures import make, tokens


def drawn(view):
    out = StringIO()
    Console(file=out, width=100, color_system=None).print(view._draw())
    return out.getvalue()


def test_it_shows_memory_links_and_where_the_time_goes():
    model = make("llama")
    with offload(model, device="cpu", cpu_memory="1MiB", batch_size=2, max_tokens=24) as session:
        view = LiveView(session.snapshot, Console(file=StringIO()))
        assert "cpu memory" in drawn(view)
        model.generate(input_ids=tokens(), max_new_tokens=5, do_sample=False)
        view.add_tokens(10)
        view.add_text("one\n" * 10 + "the end")
        text = drawn(view)
    assert "10 tokens" in text
    assert "a second for each sequence" in text
    assert "the end" in text
    assert text.count("one") < 10
    assert re.search(r"prefill .*compute \d+%", text)
    assert re.search(r"disk .* moved", text)


def test_the_command_draws_it_in_a_terminal_and_prints_the_text_at_the_end():
    child, terminal = pty.fork()
    if child == 0:
        arguments = [
            "generate",
            "demo",
            "--prompt",
            "In the",
            "--max-new-tokens",
            "40",
            "--device",
            "cpu",
            "--cpu-memory",
            "7MiB",
        ]
        os.execve(
            sys.executable, [sys.executable, "-m", "offload.cli.main", *arguments, "--live"], os.environ | {"TERM": "xterm"}
        )
    seen = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:
            break
        if not piece:
            break
        seen += piece
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    text = seen.decode(errors="replace")
    assert "cpu memory" in text
    # The view was taken away, and what remains is the answer and the report.
    assert "bound by: " in text[text.rindex("cpu memory") :]


def test_without_a_terminal_it_says_so_and_goes_on(capsys):
    assert main(["generate", "demo", "--prompt", "In", "--device", "cpu", "--max-new-tokens", "3", "--live"]) == 0
    assert "--live draws in a terminal" in capsys.readouterr().err


def test_what_ends_in_the_middle_keeps_its_text(capsys, monkeypatch):
    """Ctrl-C takes the view away, not the answer."""
    from offload.cli import generate

    def interrupted(model, prompts, sampling, batch_size, on_text, on_token, begin):
        on_text("the whole first")
        yield Completion("a", "the whole first", 3)
        on_text("half of the sec")
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "complete", interrupted)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["generate", "demo", "--prompt", "In", "--device", "cpu", "--live"]) == 130
    assert capsys.readouterr().out == "the whole first\nhalf of the sec\n"
