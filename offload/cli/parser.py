"""Reads the command line into requests; help, usage and completion are typer's."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from offload.cli.commands import COMMANDS, GROUPS, Command
from offload.cli.option import assembled, signature
from offload.version import __version__

_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    # typer takes None, which stands for no `--help`, to pydantic: a third of the time that help takes.
    "default_map": {"help": False},
}

Run = Callable[[str, Any], int]
"""Runs the command of this name with its request; returns the status of the process."""


def make_parser(run: Run, asked: str | None) -> typer.Typer:
    """The command line, for one call of it.

    Args:
        run: called with what was asked.
        asked: the word that names the command. Of the others only the names are made: each option costs time. None: of
            all of them, as completion needs it.
    """
    app = _group("Run transformers models that do not fit into memory, by streaming their weights.", asked is None)
    app.callback()(_own_options)
    groups = {name: _group(summary) for name, summary in GROUPS.items()}
    for name, group in groups.items():
        app.add_typer(group, name=name)
    for name, command in COMMANDS.items():
        group = groups.get(name.split()[0], app)
        _add(group, name, command, run if asked in (None, name.split()[0]) else None)
    return app


def _group(text: str, add_completion: bool = False) -> typer.Typer:
    return typer.Typer(
        help=text,
        no_args_is_help=True,
        add_completion=add_completion,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings=_SETTINGS,
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"offload {__version__}")
        raise typer.Exit


_Version = Annotated[
    bool, typer.Option("--version", is_eager=True, callback=_print_version, metavar="", help="Print the version.")
]


def _own_options(version: _Version = False) -> None:
    """Take what is given before the command."""


def _add(group: typer.Typer, name: str, command: Command, run: Run | None) -> None:
    def call(context: typer.Context, **values: Any) -> None:
        try:
            request = assembled(command.arguments(), values)
        except ValueError as error:
            raise typer.BadParameter(str(error), ctx=context) from None
        raise typer.Exit(run(name.split()[0], request) if run else 0)

    options = signature(command.arguments()).parameters.values() if run else ()
    parameters = [inspect.signature(call).parameters["context"], *options]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    group.command(name.split()[-1], cls=_Command, help=command.summary, context_settings=_SETTINGS)(call)


class _Command(TyperCommand):
    """A command that names the options that a wrong one may have meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return list(super().parse_args(ctx, args))
        except typer.BadParameter:
            raise
        except Exception as error:
            wrong = getattr(error, "option_name", None)
            known = [name for item in self.params for name in item.opts]
            if wrong is not None and hasattr(error, "possibilities"):
                error.possibilities = [name for name in known if name.startswith(wrong)] or error.possibilities
            raise
