"""Declares a setting as a dataclass field with its help and its check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, FrozenInstanceError, field, fields
from typing import Any, NamedTuple, TypeVar

from shardit.settings.checks import ValueCheck

T = TypeVar("T")


class Flag(NamedTuple):
    """The command-line form of a setting, as far as it does not follow from its field."""

    name: str = ""
    """The flag's name, with underscores, if it is not the field's."""
    short: str = ""
    """A second, shorter flag."""
    kind: Any = None
    """The type of the flag's value, if it is not the setting's; the default is then that of the flag."""
    default: Any = None
    metavar: str | None = None
    envvar: str | None = None
    positional: bool = False
    """Whether it is a positional argument."""
    read: Callable[[Any], Any] | None = None
    """Converts the flag's value to that of the setting."""
    each: Callable[[str], Any] | None = None
    """For a repeated flag: converts one text to a value; the setting is the tuple of all."""
    example: str = ""
    """For a repeated flag with texts such as "name=value", which make a dict: an example."""


def declare(default: Any, help: str, check: ValueCheck | None = None, *, flag: Flag | None = Flag()) -> Any:
    """Return a field with its default (or a class to make it), its help text, the check of values that are not None,
    and its flag (None: no flag)."""
    metadata = {"help": help, "check": check, "flag": flag}
    made = isinstance(default, type)
    return field(default_factory=default, metadata=metadata) if made else field(default=default, metadata=metadata)


def declared(cls: type) -> list[Field[Any]]:
    """Return the fields of a class that were made by `declare`."""
    return [item for item in fields(cls) if "help" in item.metadata]


def check_declared(settings: Any) -> None:
    """Check all values of a dataclass with declared fields. None is checked only if the default is not None."""
    for item in declared(type(settings)):
        value, check = getattr(settings, item.name), item.metadata["check"]
        if check is not None and (value is not None or item.default is not None):
            check(item.name, value)


def hinted(word: str) -> Callable[[type[T]], type[T]]:
    """Return a decorator of a frozen dataclass: if an attribute is set, the error shows how to get another object
    with that value. word: the name of an object in it."""

    def decorate(cls: type[T]) -> type[T]:
        def refuse(self: Any, name: str, value: Any) -> None:
            another = f"dataclasses.replace({word}, {name}={value!r:.80})"
            raise FrozenInstanceError(f"{cls.__name__} does not change; make another: {another}")

        cls.__setattr__ = refuse  # pyright: ignore[reportAttributeAccessIssue]
        return cls

    return decorate
