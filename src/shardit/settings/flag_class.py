"""Flags of the command line, made from declared settings."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, BadParameter, Option
from typer.core import TyperCommand

from shardit.errors import InputError
from shardit.settings.declare import Flag, declared
from shardit.settings.paths import NO_HOME


def flag_class(cls: type, *, only: Collection[str] = (), unset: bool = False, default_from: str = "") -> Any:
    """Return a dataclass with a field for each flag of the settings that `cls` declares.

    only: names of settings, if not all are wanted. unset: all flags are None by default, so given ones differ.
    default_from: for the help of these, if defaults come from elsewhere.
    """
    items = [item for item in declared(cls) if item.metadata["flag"] is not None and (not only or item.name in only)]
    hints = typing.get_type_hints(cls)
    made = [_field(item, hints[item.name], unset, default_from) for item in items]
    return dataclasses.make_dataclass(f"FlagsOf{cls.__name__}", made, frozen=True, kw_only=True)


def _field(item: dataclasses.Field[Any], kind: Any, unset: bool, default_from: str) -> tuple[str, Any, Any]:
    flag, help, default = item.metadata["flag"], item.metadata["help"], item.default
    if flag.each or flag.example:
        kind, default = list[str] | None, None
    elif flag.kind is not None:
        kind, default = flag.kind, flag.default
    if unset:
        standard = f" [default: {default_from or default}]" if default not in (None, "", False) else ""
        help, kind, default = help + standard, kind | None, None
    return flag.name or item.name, kind, dataclasses.field(default=default, metadata={**item.metadata, "help": help})


def options_of(flags: type) -> list[inspect.Parameter]:
    """Return an argument for each field of a class of flags, from which typer makes an option; the class's own come
    first."""
    hints, own = typing.get_type_hints(flags), inspect.get_annotations(flags)
    return [
        inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if item.default is dataclasses.MISSING else item.default,
            annotation=Annotated[hints[item.name], _option(item, hints[item.name])],
        )
        for item in sorted(dataclasses.fields(flags), key=lambda item: item.name not in own)
    ]


def _option(item: dataclasses.Field[Any], kind: Any) -> Any:
    flag, help = item.metadata["flag"], item.metadata["help"]
    if flag.positional:
        return Argument(metavar=flag.metavar, help=help)
    if any(typing.get_origin(one) is list for one in typing.get_args(kind)):
        text, _, default = help.partition(" [")
        help = f"{text.removesuffix('.')}; repeat the flag for several.{default and f' [{default}'}"
    # A switch that is not given leaves it to a file or the model, so that there is a flag for each of its values.
    both = item.default is None and bool in typing.get_args(kind)
    off = f"/{_spelt(f'no_{item.name}')}" if both else ""
    names = [f"{_spelt(item.name)}{off}", *([flag.short] if flag.short else [])]
    shown, paths = item.default != "", str(kind).count("Path") > 0
    more: dict[str, Any] = {"parser": _path, "metavar": flag.metavar or "PATH"} if paths else {"metavar": flag.metavar}
    return Option(*names, help=help, envvar=flag.envvar, show_default=shown, **more)


class Once(TyperCommand):
    """A command that refuses flags that are given twice, but for those that may be repeated."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of a command line."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for flag in order:
            if order.count(flag) > 1 and not getattr(flag, "multiple", False):
                ctx.fail(f"{flag.opts[0]} is given twice; give it once")
        return super().parse_args(ctx, args)


def _path(text: str) -> Path:
    """Return a path of the command line, with ~ expanded; an empty one would be the current folder."""
    if not text:
        raise BadParameter("it is empty; name a file or a folder")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise BadParameter(f"{text}: {NO_HOME}") from None


def _spelt(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def values_of(flags: Any, cls: type, only: Collection[str] = ()) -> dict[str, Any]:
    """Return the settings of `cls` by name, as given by flags; those that are None are left out. only: as of
    `flag_class`. Raises InputError."""
    found = {}
    for item in declared(cls):
        if (flag := item.metadata["flag"]) is None or (only and item.name not in only):
            continue
        if (value := getattr(flags, flag.name or item.name)) is not None:
            found[item.name] = _read(flag, flag.name or item.name, value)
    return found


def _read(flag: Flag, name: str, value: Any) -> Any:
    if flag.each is not None:
        return tuple(map(flag.each, value))
    if flag.example:
        return parse_values(_spelt(name), value, flag.example)
    return value if flag.read is None else flag.read(value)


def check_flags(flags: Any, *classes: type) -> None:
    """Check the values of flags by what the settings of `classes` take, of which a command may have some. Raises
    InputError, which names the flag."""
    for item in (item for cls in classes for item in declared(cls)):
        flag, check = item.metadata["flag"], item.metadata["check"]
        if flag is None or check is None:
            continue
        name = flag.name or item.name
        if (value := getattr(flags, name, None)) is not None and check.problem(value):
            raise InputError(f"{_spelt(name)} must be {check.limits}, got {value!r:.200}")


def parse_values(flag: str, entries: Sequence[str] | None, example: str) -> dict[str, Any]:
    """Return the values of a repeated `flag name=value` by name. Raises InputError for other text, and what is given
    twice."""
    found: dict[str, Any] = {}
    for entry in entries or ():
        name, sign, text = entry.partition("=")
        if not (sign and name.isidentifier()):
            raise InputError(f"{flag} must be name=value, as in {example}, got {entry!r}")
        if name in found:
            raise InputError(f"{flag} {name} is given twice; give it once")
        found[name] = _as_value(flag, name, text)
    return found


def _as_value(flag: str, name: str, text: str) -> Any:
    """Return the value of `flag name=text`: JSON, or the text itself if it is none."""
    python = {"True": "true", "False": "false", "None": "null"}
    if text in python:
        raise InputError(f"{flag} {name}={text}: values are JSON; write {name}={python[text]}")
    try:
        return json.loads(text)
    except ValueError:
        return text
