"""`StructuredOutputsParams`: the form that a text must have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from shardit.config import reject_unknown_names
from shardit.errors import InputError
from shardit.settings.checks import ValueCheck, matching, text_problem
from shardit.settings.declare import check_declared, declare, hinted

MAX_CHARACTERS = 100_000
"""Maximum length of a grammar or a JSON schema: long ones take seconds to compile, in which all texts wait."""


def _text(meaning: str) -> ValueCheck:
    return ValueCheck(
        meaning, lambda value: (text_problem(value) or None) if isinstance(value, str) and value else meaning
    )


_CHOICE = "a list of texts that are not empty"
_choice = ValueCheck(
    _CHOICE,
    lambda value: (
        text_problem(list(value))
        if isinstance(value, (list, tuple)) and value and all(isinstance(one, str) and one for one in value)
        else _CHOICE
    ),
)
_schema = matching("a JSON schema, as a dict or as JSON text", lambda value: isinstance(value, (Mapping, str)))


@hinted("structured")
@dataclass(frozen=True)
class StructuredOutputsParams:
    """The form that a text must have, with vLLM's names; one of the fields is given. Invalid values raise
    InputError."""

    json: Mapping[str, Any] | str | None = declare(
        None, "JSON schema: the text is JSON that it validates.", _schema, flag=None
    )
    json_object: bool | None = declare(
        None, "True: the text is any JSON object.", matching("True", lambda value: value is True), flag=None
    )
    regex: str | None = declare(
        None, "Regular expression for the whole text.", _text("a regular expression"), flag=None
    )
    choice: Sequence[str] | None = declare(None, "Texts, of which the text is one.", _choice, flag=None)
    grammar: str | None = declare(
        None,
        "Context-free grammar for the text, in the form of Lark.",
        _text("a grammar in the form of Lark"),
        flag=None,
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> StructuredOutputsParams:
        reject_unknown_names(cls.__name__, kwargs, [item.name for item in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_declared(self)
        if len(self.given) != 1:
            names = ", ".join(item.name for item in fields(self))
            raise InputError(f"structured_outputs must have one of {names}, got {', '.join(self.given) or 'none'}")

    @property
    def given(self) -> dict[str, Any]:
        """The field that is given, as {name: value}."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def structured_outputs_of(value: Any) -> StructuredOutputsParams:
    """Return a value of the parameter `structured_outputs`, for which a dict of the fields may be given. Raises
    InputError for anything else."""
    if isinstance(value, StructuredOutputsParams):
        return value
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise InputError(
            f"structured_outputs must be StructuredOutputsParams or a dict of its fields, got {value!r:.80}"
        )
    return StructuredOutputsParams(**value)
