"""How a command's options are declared: as fields of dataclasses, of which typer sees one signature."""

import inspect
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

import typer
from typer.models import OptionInfo

from offload.config import parse_bytes
from offload.storage.errors import ConfigError


@dataclass(frozen=True)
class Group:
    """Options that stand together in the help, under a title; several commands may have them."""

    title: ClassVar[str]


@dataclass(frozen=True)
class Arguments:
    """What one command is asked: options of its own, and groups of them."""


def option(text: str, metavar: str | None = None) -> Any:
    """Annotate a field as an option, which has the field's name.

    Args:
        text: of the help.
        metavar: what the value is called there.
    """
    return typer.Option(help=text, metavar=metavar)


def size_option(text: str) -> Any:
    """Annotate a field as an option that takes a number of bytes, like 8GiB; another text is a wrong call."""
    return typer.Option(help=text, metavar="SIZE", callback=_checked_size)


def _checked_size(parameter: typer.CallbackParam, value: str | None) -> str | None:
    try:
        parse_bytes(value, str(parameter.name))
    except ConfigError as error:
        raise typer.BadParameter(str(error).removeprefix(f"{parameter.name}=")) from None
    return value


def argument(text: str, metavar: str) -> Any:
    """Annotate a field as a value that is given without a name."""
    return typer.Argument(help=text, metavar=metavar, show_default=False)


def signature(command: type[Arguments]) -> inspect.Signature:
    """All options of a command and of its groups, one after another."""
    return inspect.Signature(list(_parameters(command, None)))


def assembled(kind: type, values: Mapping[str, Any]) -> Any:
    """The arguments, with their groups, that the values of all options make."""
    hints = get_type_hints(kind)
    return kind(
        **{
            field.name: assembled(hints[field.name], values) if is_dataclass(hints[field.name]) else values[field.name]
            for field in fields(kind)
        }
    )


def _parameters(owner: type, title: str | None) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(owner, include_extras=True)
    for field in fields(owner):
        if is_dataclass(group := hints[field.name]):
            yield from _parameters(group, group.title)  # type: ignore[arg-type, union-attr]
            continue
        kind, info = get_args(hints[field.name])
        info = copy(info)
        if isinstance(info, OptionInfo):
            # typer would give what is true or false an opposite, `--no-...`.
            info.param_decls = (f"--{field.name.replace('_', '-')}",)
            info.metavar = "" if kind is bool else info.metavar
            info.rich_help_panel = title
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=Annotated[kind, info]
        )


def _default(field: "Field[Any]") -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is MISSING else field.default
