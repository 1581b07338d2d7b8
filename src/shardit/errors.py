"""The errors that a user can meet: theirs (`InputError`) and ours (`RankError`); errors of libraries in one line."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable, Sequence
from typing import Any


class InputError(ValueError):
    """The request cannot be run as given; the text names the change. Exit code 2."""


class UnsupportedError(InputError):
    """The model or the option is understood, but cannot be run correctly here. Exit code 2."""


class NothingToSaveError(InputError):
    """A result is empty, as its request asked for too little. Exit code 2."""


class RankError(RuntimeError):
    """A rank alone died, hung past the timeout or raised. Exit code 1.

    `rank` is the rank number (-1 if it is not known), `reason` its traceback or signal.
    """

    def __init__(self, rank: int, reason: str):
        self.rank = rank
        self.reason = reason
        super().__init__(f"rank {rank} failed: {reason}" if rank >= 0 else reason)

    def __reduce__(self):
        return (RankError, (self.rank, self.reason))


def first_line(error: BaseException) -> str:
    """Return the text of a library's exception in one line: a heading ("Error(s) in ...:") with the line after it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    count = next((number for number, line in enumerate(lines, 1) if not line.endswith(":")), len(lines))
    return " ".join(lines[:count]) or type(error).__name__


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first names in one line, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


_interrupts: list[int] = []
"""Signals that `note_interrupt` has received."""


def note_interrupt(number: int, frame: Any) -> None:
    """Handle SIGINT as Python does, and note it: imports of libraries may lose the KeyboardInterrupt."""
    _interrupts.append(number)
    signal.default_int_handler(number, frame)


def is_interrupt(error: BaseException) -> bool:
    """Return whether an exception comes of Ctrl-C: imports of libraries, and Python until 3.11 in `__set_name__`, turn
    a KeyboardInterrupt into another error with that as its cause, or lose it and fail afterwards."""
    if _interrupts and isinstance(error, ImportError):
        return True
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if isinstance(one, KeyboardInterrupt):
            return True
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            todo += [one.__cause__, one.__context__]
    return False


def first_filled_line(text: str) -> str:
    """Return the first line of a text with more than blanks in it; "" if there is none."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the text " (did you mean 'x'?)" for the likeliest known name, or nothing."""
    likely = likeliest(str(name), list(known))
    return f" (did you mean {likely!r}?)" if likely else ""


def likeliest(word: str, known: Sequence[str]) -> str | None:
    """Return the only known name that ends or else begins with the word, or the nearest, of like ones that with most
    words of it; None if there is none."""
    ends = [one for one in known if len(word) > 2 and one.endswith(f"_{word}")]
    begins = [one for one in known if len(word) > 2 and one.startswith(f"{word}_")]
    of_words = begins if len(ends) != 1 else ends
    near = of_words if len(of_words) == 1 else difflib.get_close_matches(word, known, n=3)
    words = set(word.split("_"))
    return max(near, key=lambda one: len(words & set(one.split("_"))), default=None)  # the first of equal ones
