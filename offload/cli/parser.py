"""Reads the command line into requests; help, usage and completion are typer's."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from offload.cli.arguments.finetune import FinetuneArguments
from offload.cli.arguments.generate import GenerateArguments
from offload.cli.arguments.others import MergeArguments, ProbeArguments, ReplayArguments, ReportArguments, SynthArguments
from offload.cli.arguments.plan import PlanArguments
from offload.cli.option import Arguments, assembled, signature
from offload.version import __version__

COMMANDS: dict[str, type[Arguments]] = {
    "generate": GenerateArguments,
    "finetune": FinetuneArguments,
    "merge": MergeArguments,
    "plan": PlanArguments,
    "probe": ProbeArguments,
    "report": ReportArguments,
    "synth": SynthArguments,
}

Run = Callable[[str, Any], int]
"""Runs the command of this name with its request; returns the status of the process."""


def make_parser(run: Run) -> typer.Typer:
    """The whole command line."""
    app = _group("Run transformers models that do not fit into memory, by streaming their weights.", add_completion=True)
    app.callback()(_own_options)
    for name, request in COMMANDS.items():
        _add(app, name, request, run)
    experts = _group(ReplayArguments.summary)
    _add(experts, "replay", ReplayArguments, lambda _, asked: run("experts", asked))
    app.add_typer(experts, name="experts")
    return app


def _group(text: str, add_completion: bool = False) -> typer.Typer:
    return typer.Typer(
        help=text,
        no_args_is_help=True,
        add_completion=add_completion,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
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


def _add(app: typer.Typer, name: str, request: type[Arguments], run: Run) -> None:
    def call(context: typer.Context, **values: Any) -> None:
        try:
            asked = assembled(request, values)
        except ValueError as error:
            raise typer.BadParameter(str(error), ctx=context) from None
        raise typer.Exit(run(name, asked))

    parameters = [inspect.signature(call).parameters["context"], *signature(request).parameters.values()]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    settings = {"help_option_names": ["-h", "--help"]}
    app.command(name, cls=_Command, help=request.summary, context_settings=settings)(call)


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
