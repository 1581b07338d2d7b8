"""InputError with the cure for calls of the API whose arguments have a wrong name or place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from shardit.errors import InputError, did_you_mean

P = ParamSpec("P")
R = TypeVar("R")


def checked_arguments(callee: str, elsewhere: type | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator of methods that raises InputError if Python would raise TypeError for the arguments.
    elsewhere: a dataclass whose fields users may give to this method instead."""

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(method)

        @functools.wraps(method)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise InputError(_problem(callee, signature, len(args), kwargs, elsewhere, error)) from error
            return method(*args, **kwargs)

        return checked

    return decorate


def _problem(
    callee: str,
    signature: inspect.Signature,
    count: int,
    keywords: Mapping[str, Any],
    elsewhere: type | None,
    error: TypeError,
) -> str:
    """Return the mistake of a call with `count` arguments without a name (self is one), and its cure."""
    _, *parameters = signature.parameters.values()
    named = [one.name for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    placed = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    if count - 1 > len(placed):
        example = next(name for name in named if name not in placed)
        return (
            f"{callee} takes {len(placed)} argument{'s' * (len(placed) != 1)} without a name ({', '.join(placed)}), "
            f"got {count - 1}; give the others by name, such as {example}=..."
        )
    open_ended = any(one.kind is one.VAR_KEYWORD for one in parameters)
    unknown = next((name for name in keywords if name not in named and not open_ended), None)
    if unknown is None:
        return f"{callee}: {error}"
    if elsewhere is not None and unknown in elsewhere.__dataclass_fields__:
        own = elsewhere.__name__
        return f"{callee} takes no {unknown!r}: it is a field of {own}, give {own}({unknown}={keywords[unknown]!r:.80})"
    return f"{callee} takes no {unknown!r}{did_you_mean(unknown, named)}; it takes: {', '.join(named)}"
