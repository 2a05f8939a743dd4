"""Fills the page of commands from the options that the command line is made of."""

import re
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from typer.models import OptionInfo

from offload.cli.commands import COMMANDS

_MARK = "<!-- commands -->"
_BESIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)]*)\)")


def on_page_markdown(markdown: str, **ignored: Any) -> str:
    """Called by mkdocs with each page: files of the repository have no page here, so links to them become their names."""
    named = _BESIDE.sub(r"\1 (`\2`)", markdown)
    return named.replace(_MARK, commands()) if _MARK in named else named


def commands() -> str:
    """All commands with their options, as Markdown."""
    return "\n".join(
        f"## offload {name}\n\n{command.summary}\n\n{_tables(command.arguments(), '')}" for name, command in COMMANDS.items()
    )


def _tables(kind: type, title: str) -> str:
    hints = get_type_hints(kind, include_extras=True)
    rows = [_row(field, hints[field.name]) for field in fields(kind) if not is_dataclass(hints[field.name])]
    own = f"{title and f'**{title}**'}\n\n| Option | What it says | Default |\n|---|---|---|\n" + "".join(rows) if rows else ""
    groups = [hints[field.name] for field in fields(kind) if is_dataclass(hints[field.name])]
    return own + "\n" + "".join(_tables(group, group.title) for group in groups)


def _row(field: Any, hint: Any) -> str:
    kind, info = get_args(hint)
    words = " ".join(word for word in get_args(kind) if isinstance(word, str))
    value = "" if kind is bool else f" {info.metavar or words}"
    name = f"--{field.name.replace('_', '-')}{value}" if isinstance(info, OptionInfo) else info.metavar
    default = "" if field.default in (MISSING, None, False) else f"`{field.default}`"
    return f"| `{name}` | {info.help} | {default} |\n"
