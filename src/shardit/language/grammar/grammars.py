"""From the form that a text must have to a grammar of llguidance, and the check of it. Imports no torch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from shardit.errors import InputError, UnsupportedError, first_line
from shardit.language.request.structured_outputs import MAX_CHARACTERS, StructuredOutputsParams
from shardit.loading.missing_packages import check_installed

JSON_OPTIONS: dict[str, Any] = {
    "whitespace_pattern": r"( |\n {0,16})?",
    "lenient": False,
    "coerce_one_of": False,
}
"""Between the parts of JSON there is at most one space or one indented line: a weak model would write spaces for ever.
A part of a schema that no grammar can express is an error, so that every complete text is valid."""

MOST_LOOKS = 200
"""Parts of a wrong schema that are tried at most to find the wrong one."""

_SUBSCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE = ("items", "additionalProperties", "additionalItems", "contains", "not", "if", "then", "else")


def grammar_text(form: StructuredOutputsParams) -> str:
    """Return the grammar of a form, as llguidance takes it. Raises InputError for JSON that cannot be read."""
    from llguidance import LLMatcher

    ((name, value),) = form.given.items()
    if name == "choice":
        return LLMatcher.grammar_from_lark(f"start: {' | '.join(map(quoted, value))}")
    if name == "regex":
        return LLMatcher.grammar_from_regex(value)
    if name == "grammar":
        return LLMatcher.grammar_from_lark(value)
    return LLMatcher.grammar_from_json_schema(_with_options(_schema_of(name, value)))


def quoted(text: str) -> str:
    """Return a text as a literal of a grammar."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Mapping[str, Any]) -> str:
    """Return the rule of a grammar in the form of Lark for JSON that a schema validates."""
    return f"%json {json.dumps(_with_options(schema))}"


def check_forms(forms: Iterable[StructuredOutputsParams | None], tokenizer: Any) -> None:
    """Check each of different forms once, see `check_form`."""
    last: StructuredOutputsParams | None = None
    for form in forms:
        if form is not None and form is not last and form != last:
            check_form(form, tokenizer)
            last = form


def check_form(form: StructuredOutputsParams, tokenizer: Any) -> None:
    """Raise InputError for a form that cannot be made a grammar of, or that no text has, naming the place in a schema;
    UnsupportedError for a tokenizer whose tokens are not known."""
    check_installed(("llguidance",))
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError("structured_outputs needs a fast tokenizer (tokenizer.json), which the model has not")
    ((name, value),) = form.given.items()
    length = len(value) if isinstance(value, str) else len(json.dumps(value, default=str))
    if length > MAX_CHARACTERS:
        raise InputError(
            f"structured_outputs.{name} has {length} characters, the limit is {MAX_CHARACTERS}; shorten it"
        )
    schema = _schema_of(name, value) if name == "json" else {}
    problem = _problem(grammar_text(form)) if name != "json" else _schema_problem(schema)
    if problem is None:
        return
    where = _place(schema, schema) if name == "json" else ()
    raise InputError(f"structured_outputs.{'.'.join((name, *where))} cannot be used: {problem}")


def _schema_of(name: str, value: Any) -> Mapping[str, Any]:
    if name == "json_object":
        return {"type": "object"}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"structured_outputs.json must be a JSON schema: {first_line(error)}") from None
    if not isinstance(value, Mapping):
        raise InputError(f"structured_outputs.json must be a JSON schema that is an object, got {value!r:.80}")
    return value


def _with_options(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {**schema, "x-guidance": JSON_OPTIONS}


def _schema_problem(schema: Any) -> str | None:
    if not isinstance(schema, Mapping):
        return None if isinstance(schema, bool) else "a schema must be an object or a boolean"
    from llguidance import LLMatcher

    try:
        return _problem(LLMatcher.grammar_from_json_schema(_with_options(schema)))
    except (ValueError, TypeError, RecursionError) as error:
        return first_line(error)


def _problem(grammar: str) -> str | None:
    """Return what is wrong with a grammar, in a line. Bytes stand for tokens, so it holds for any tokenizer."""
    from llguidance import LLMatcher, LLTokenizer

    is_wrong, texts = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_wrong:
        return _one_line(texts[0])
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if not matcher.is_error():
        return None
    text = matcher.get_error()
    return "no text has this form" if text.startswith("NoExtension") else _one_line(text.partition("\n<")[0])


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _place(schema: Any, root: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the path to the innermost part of a schema that alone is wrong, as far as `MOST_LOOKS` show it."""
    shared = {name: root[name] for name in ("$defs", "definitions") if name in root}
    path, looks = (), itertools.count()
    while True:
        for name, part in _parts(schema):
            found = {**shared, **part} if isinstance(part, Mapping) else part
            if next(looks) < MOST_LOOKS and _schema_problem(found) is not None:
                path, schema = (*path, *name), part
                break
        else:
            return path


def _parts(schema: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(schema, Mapping):
        return
    for name in _SUBSCHEMAS:
        if isinstance(schema.get(name), Mapping):
            yield from (((name, str(key)), part) for key, part in schema[name].items())
    for name in _LISTS:
        if isinstance(schema.get(name), list):
            yield from (((name, str(number)), part) for number, part in enumerate(schema[name]))
    for name in _SINGLE:
        if isinstance(schema.get(name), Mapping):
            yield (name,), schema[name]
