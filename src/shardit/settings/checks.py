"""Checks of the values of settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from shardit.errors import InputError


@dataclass(frozen=True)
class ValueCheck:
    """The valid values of a setting. A call with the setting's name and a value raises InputError for any other
    value."""

    meaning: str
    """The values in words, as in "a whole number of at least 1"."""
    problem: Callable[[Any], str | None]
    """Returns the requirement that a value violates; None for a valid value."""
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    """An exclusive lower limit."""
    each: ValueCheck | None = None
    """The check of the entries of a list."""

    def __call__(self, name: str, value: Any) -> None:
        if wrong := self.problem(value):
            raise InputError(f"{name} must be {wrong}, got {value!r:.200}")
        if self.each is not None and isinstance(value, (list, tuple)):
            for position, entry in enumerate(value):
                self.each(f"{name}[{position}]", entry)

    @property
    def limits(self) -> str:
        """The limits of a number alone, as in "at least 1"."""
        if self.above is not None or self.minimum is None:
            upper = "" if self.maximum is None else f" and at most {self.maximum:g}"
            return self.meaning if self.above is None else f"above {self.above:g}{upper}"
        return f"at least {self.minimum}" if self.maximum is None else f"from {self.minimum} to {self.maximum}"


def matching(meaning: str, fits: Callable[[Any], bool]) -> ValueCheck:
    """Return a check by a condition; `meaning` describes the valid values. A condition that cannot be tested does not
    hold: arrays are neither equal nor unequal to a text."""

    def problem(value: Any) -> str | None:
        try:
            return None if fits(value) else meaning
        except (TypeError, ValueError):
            return meaning

    return ValueCheck(meaning, problem)


def whole(minimum: int, maximum: int | None = None, *, meaning: str = "") -> ValueCheck:
    """Return a check for whole numbers from `minimum` to `maximum`; bools are refused."""
    limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    meaning = meaning or f"a whole number {limits}"

    def problem(value: Any) -> str | None:
        fits = isinstance(value, Integral) and not isinstance(value, bool)
        return None if fits and minimum <= int(value) <= (math.inf if maximum is None else maximum) else meaning

    return ValueCheck(meaning, problem, minimum, maximum)


LARGEST = 3.4028234663852886e38
"""The largest number of float32: torch raises an error without a name for larger ones."""


def is_number(value: object) -> bool:
    """Return whether a value is a finite number of at most LARGEST, and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(float_of(value)) <= LARGEST


def float_of(value: Any) -> float:
    """Convert a number; whole numbers of any length, too."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def number_problem(value: Any) -> str | None:
    """Return the requirement that a value violates that is no number for `is_number`; None if it is one."""
    if is_number(value):
        return None
    large = isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(float_of(value))
    return "a finite number" + (f" within {LARGEST:.2g}" if large else "")


def number(minimum: float | None = None, maximum: float | None = None, *, above: float | None = None) -> ValueCheck:
    """Return a check for finite numbers within the limits (`above` excludes the limit itself); bools are refused."""

    def problem(value: Any) -> str | None:
        if wrong := number_problem(value):
            return wrong
        amount = float(value)
        if above is not None and not amount > above:
            return f"greater than {above:g}"
        if minimum is not None and amount < minimum:
            return f"at least {minimum:g}"
        return f"at most {maximum:g}" if maximum is not None and amount > maximum else None

    limits = [(" greater than", above), (" of at least", minimum), (", at most", maximum)]
    words = "".join(f"{text} {limit:g}" for text, limit in limits if limit is not None)
    return ValueCheck(f"a finite number{words}", problem, minimum, maximum, above)


def numbers(each: ValueCheck, *, or_one: bool = False) -> ValueCheck:
    """Return a check for a list that is not empty with entries that pass `each`, or with `or_one` for one such
    value."""

    def problem(value: Any) -> str | None:
        if or_one and not isinstance(value, (list, tuple)):
            return each.problem(value)
        listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and value
        return None if listed else "a list of numbers that is not empty"

    one = f"{each.meaning}, or " if or_one else ""
    return ValueCheck(f"{one}a list of at least one entry, each {each.meaning}", problem, each=each)


FLAG = matching("True or False", lambda value: isinstance(value, bool))


def text_problem(value: Any) -> str | None:
    """Return the requirement that a text, or a text in nested lists and dicts, violates; None for other values. What a
    shell passes on in another encoding than UTF-8 becomes lone halves of characters, which no tokenizer takes."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return "valid text in UTF-8, without half characters (lone surrogates)"
    elif isinstance(value, Mapping):
        return next(filter(None, map(text_problem, (*value.keys(), *value.values()))), None)
    elif isinstance(value, (list, tuple)):
        return next(filter(None, map(text_problem, value)), None)
    return None


TEXT = ValueCheck("a string", lambda value: text_problem(value) if isinstance(value, str) else "a string")
NAME = matching(
    "a name, without blanks around it or control characters",
    lambda value: isinstance(value, str) and value == value.strip() != "" and value.isprintable(),
)
NAMED_VALUES = matching(
    "a dict with names as keys",
    lambda value: isinstance(value, Mapping) and all(isinstance(key, str) for key in value),
)

_FLAG_TEXTS = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}


def text_as_flag(value: Any) -> Any:
    """Convert a text to the bool that it means, in any case of letters: forms and command lines have only texts. Other
    values are returned unchanged."""
    return _FLAG_TEXTS.get(value.strip().lower(), value) if isinstance(value, str) else value
