"""Pieces that the sections of the page are put together from."""

import html
from collections.abc import Sequence
from typing import Any


def text(value: Any) -> str:
    return html.escape(str(value))


def bar(parts: Sequence[tuple[str, float, str]], whole: float) -> str:
    shown = [(name, value, colour) for name, value, colour in parts if value / whole >= 0.002]
    pieces = "".join(
        f"<i style='width:{100 * value / whole:.2f}%;background:var({colour})' title='{text(name)}'></i>"
        for name, value, colour in shown
    )
    keys = "".join(
        f"<span><i style='background:var({colour})'></i>{text(name)} {value / whole:.0%}</span>"
        for name, value, colour in shown
    )
    return f"<div class=bar>{pieces}</div><div class=keys>{keys}</div>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns that nothing is in are left out."""
    used = [index for index in range(len(head)) if any(cells[index] for cells in rows)]
    head, rows = [head[index] for index in used], [[cells[index] for index in used] for cells in rows]

    def row(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}{' class=n' if i else ''}>{text(c)}</{tag}>" for i, c in enumerate(cells)) + "</tr>"

    return f"<div class=scroll><table>{row('th', head)}{''.join(row('td', cells) for cells in rows)}</table></div>"
