"""Bars that are drawn while something takes long."""

import io

from rich.console import Console

from offload.cli.terminal import Bars


def bars(terminal=True):
    text = io.StringIO()
    return Bars(Console(file=text, force_terminal=terminal, width=100)), text


def test_a_step_in_bytes_tells_how_many_and_leaves_nothing_on():
    drawn, text = bars()
    drawn.show("loading", 1 << 20, 4 << 20)
    assert drawn._drawn is not None
    drawn.show("loading", 4 << 20, 4 << 20)
    assert drawn._drawn is None
    assert "loading" in text.getvalue()
    assert "MiB" in text.getvalue()


def test_a_step_of_a_few_tells_no_bytes():
    drawn, text = bars()
    drawn.show("measuring", 1, 8)
    drawn.close()
    assert "measuring" in text.getvalue()
    assert "bytes" not in text.getvalue()


def test_bars_come_again_for_the_next_step():
    drawn, text = bars()
    for what in ("converting", "loading"):
        drawn.show(what, 0, 2048)
        drawn.show(what, 2048, 2048)
    assert "converting" in text.getvalue()
    assert "loading" in text.getvalue()


def test_nothing_is_drawn_after_closing_nor_beside_a_terminal():
    for drawn, text in (bars(), bars(terminal=False)):
        drawn.close()
        drawn.show("loading", 0, 2048)
        assert not text.getvalue()
