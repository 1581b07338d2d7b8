"""Flags of the command line, made from declared settings."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Collection, Sequence
from typing import Annotated, Any

from typer import Option

from shardit.errors import InputError
from shardit.settings.declare import declared


def flag_class(name: str, cls: type, *, only: Collection[str] = (), unset: bool = False) -> Any:
    """A dataclass with a field for each flag of the settings that `cls` declares; typer makes its options from it.

    only: names of settings, where not all are wanted. unset: all flags are None by default, and so tell what was given.
    """
    items = [item for item in declared(cls) if item.metadata["flag"] is not None and (not only or item.name in only)]
    made = [_flag(cls, item, unset) for item in items]
    return dataclasses.make_dataclass(name, made, frozen=True, kw_only=True)


def _flag(cls: type, item: dataclasses.Field[Any], unset: bool) -> tuple[str, Any, Any]:
    flag, help = item.metadata["flag"], item.metadata["help"]
    name = flag.name or item.name
    kind, default = typing.get_type_hints(cls)[item.name], item.default
    if flag.kind is not None:
        kind, default = flag.kind, flag.default
    if kind == list[str] | None:
        help = f"{help.removesuffix('.')}; repeat the flag for several."
    if unset:
        help, kind, default = help + (f" [default: {default}]" if default is not None else ""), kind | None, None
    names = [f"--{name.replace('_', '-')}", *([flag.short] if flag.short else [])]
    option = Option(*names, help=help, metavar=flag.metavar, envvar=flag.envvar)
    return name, Annotated[kind, option], dataclasses.field(default=default)


def values_of(flags: Any, cls: type) -> dict[str, Any]:
    """The settings of `cls` by name, as given by flags; those that are None are left out. Raises InputError."""
    found = {}
    for item in declared(cls):
        if (flag := item.metadata["flag"]) is None:
            continue
        if (value := getattr(flags, flag.name or item.name)) is not None:
            found[item.name] = value if flag.read is None else flag.read(value)
    return found


def check_flags(flags: Any, *classes: type) -> None:
    """Check the values of flags by what the settings of `classes` take. Raises InputError, which names the flag."""
    for item in (item for cls in classes for item in declared(cls)):
        flag, check = item.metadata["flag"], item.metadata["check"]
        if flag is None or check is None or flag.kind == list[str] | None:
            continue
        name = flag.name or item.name
        if (value := getattr(flags, name)) is not None and check.problem(value):
            raise InputError(f"--{name.replace('_', '-')} must be {check.limits}, got {value}")


def parse_values(flag: str, entries: Sequence[str] | None, example: str) -> dict[str, Any]:
    """The values of a repeated `flag name=value` by name. Raises InputError for other text, and what is given twice."""
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
    """The value of `flag name=text`: JSON, or the text itself where it is none."""
    python = {"True": "true", "False": "false", "None": "null"}
    if text in python:
        raise InputError(f"{flag} {name}={text}: values are JSON; write {name}={python[text]}")
    try:
        return json.loads(text)
    except ValueError:
        return text
