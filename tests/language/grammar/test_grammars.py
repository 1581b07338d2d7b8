"""Forms of texts: grammars of them, and what is wrong with a form, in a line that names the place."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

pytest.importorskip("llguidance")

import jsonschema

from shardit import InputError, SamplingParams, StructuredOutputsParams, UnsupportedError
from shardit.language.grammar.grammars import check_form
from shardit.language.grammar.token_masks import GrammarError, TokenMasks
from shardit.models.tiny.language import tokenizer

END = 1
TOKENIZER = tokenizer()
WIDTH = 300
"""More logits than tokens, as in models with a padded vocabulary."""


def walk(form: StructuredOutputsParams, seed: int = 0, most: int = 300) -> str:
    """A text of random allowed tokens, which ends when it may."""
    draw, made, mask = random.Random(seed), [], TokenMasks(TOKENIZER, frozenset([END])).begin(form, WIDTH)
    while len(made) < most:
        allowed = mask.after(made).nonzero().flatten().tolist()
        assert max(allowed) < len(TOKENIZER)
        if END in allowed:
            break
        made.append(draw.choice(allowed))
    else:
        raise AssertionError(TOKENIZER.decode(made))
    return TOKENIZER.decode(made)


ITEMS = [{"type": "integer"}, {"type": "boolean"}]
SCHEMAS: list[dict[str, Any]] = [
    {"type": "integer"},
    {"type": "integer", "minimum": 19_999_999_990, "maximum": 20_000_000_000},
    {"enum": ["x", 1, None, {"a": [1, 2]}]},
    {"type": "array", "items": ITEMS, "minItems": 2, "maxItems": 2},
    {"$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "items": ITEMS, "additionalItems": False},
    {"type": "array", "prefixItems": ITEMS, "items": False, "minItems": 2},
    {
        "type": "object",
        "patternProperties": {"^a[bc]$": {"type": "integer"}},
        "additionalProperties": False,
        "minProperties": 1,
    },
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "next": {"$ref": "#/$defs/one"}},
        "required": ["name", "next"],
        "additionalProperties": False,
        "$defs": {"one": {"anyOf": [{"type": "null"}, {"type": "string", "format": "date"}]}},
    },
]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_texts_validate(schema: dict[str, Any]) -> None:
    for form in (StructuredOutputsParams(json=schema), StructuredOutputsParams(json=json.dumps(schema))):
        check_form(form, TOKENIZER)
        for seed in range(5):
            made = json.loads(walk(form, seed))
            draft = (
                jsonschema.Draft7Validator if isinstance(schema.get("items"), list) else jsonschema.Draft202012Validator
            )
            draft(schema).validate(made)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"properties": {"foo": "bar"}}, "json.properties.foo cannot be used: schema must be an object"),
        (
            {"properties": {"a": {"items": {"not": {}}}}},
            'json.properties.a.items cannot be used: Unimplemented keys: ["not"]',
        ),
        (
            {"anyOf": [{}, {"uniqueItems": True, "type": "array"}]},
            'json.anyOf.1 cannot be used: Unimplemented keys: ["uniqueItems"]',
        ),
        (
            {"$defs": {"x": {"type": "banana"}}, "$ref": "#/$defs/x"},
            "json.$defs.x cannot be used: Invalid type: banana",
        ),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"type": "string", "format": "nope"}, "Unknown format: nope"),
        ({"minimum": 5, "maximum": 3, "type": "integer"}, "minimum (5) is greater than maximum (3)"),
        ({"minimum": 10**30}, "1000000"),
        ({"$ref": "#"}, "json cannot be used: no text has this form"),
        ({"$ref": "#/nowhere"}, "'/nowhere' does not exist"),
        ({"$ref": "https://example.org/x"}, "not fetch"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "Unimplemented"),
        ("{", "must be a JSON schema: Expecting property name"),
        ("[]", "must be a JSON schema that is an object"),
        ({"description": "x" * 100_001}, "the limit is 100000"),
    ],
)
def test_wrong_schemas(schema: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        check_form(StructuredOutputsParams(json=schema), TOKENIZER)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_forms() -> None:
    assert walk(StructuredOutputsParams(choice=['red "ish"', "blau\n", "é🙂"]), 3) in ('red "ish"', "blau\n", "é🙂")
    assert walk(StructuredOutputsParams(regex=r"[ab]{3}c")).endswith("c")
    assert walk(StructuredOutputsParams(grammar='start: "a" b\nb: "x" | "(" b ")"')).startswith("a")
    with pytest.raises(InputError, match=r"structured_outputs\.regex cannot be used: .*unclosed group"):
        check_form(StructuredOutputsParams(regex="("), TOKENIZER)
    with pytest.raises(InputError, match=r'structured_outputs\.grammar cannot be used: .*unknown name: "foo"'):
        check_form(StructuredOutputsParams(grammar='start: "a" | foo'), TOKENIZER)

    class Slow:
        is_fast = False

    with pytest.raises(UnsupportedError, match="fast tokenizer"):
        check_form(StructuredOutputsParams(json_object=True), Slow())


def test_spaces_do_not_go_on_for_ever() -> None:
    form, made = StructuredOutputsParams(json={"type": "object"}), []
    mask = TokenMasks(TOKENIZER, frozenset([END])).begin(form, WIDTH)
    spaces = TOKENIZER(" \n{")["input_ids"][:2]
    made = TOKENIZER("{")["input_ids"]
    for _ in range(100):
        allowed = [one for one in spaces if bool(mask.after(made)[one])]
        if not allowed:
            break
        made.append(allowed[-1])
    assert len(made) < 30


def test_a_text_continues_with_a_new_state() -> None:
    masks, form = TokenMasks(TOKENIZER, frozenset([END])), StructuredOutputsParams(json={"type": "object"})
    made = TOKENIZER('{"a": [1')["input_ids"]
    one, other = masks.begin(form, WIDTH), masks.begin(form, WIDTH)
    for count in range(len(made)):
        one.after(made[:count])
    assert one.after(made).equal(other.after(made))
    assert not one.after(made).equal(masks.begin(form, WIDTH).after(made[:-1]))
    with pytest.raises(GrammarError):
        masks.begin(form, WIDTH).after(TOKENIZER("x")["input_ids"])


def test_parameters() -> None:
    form = StructuredOutputsParams(choice=["a"])
    assert SamplingParams(structured_outputs={"choice": ["a"]}).structured_outputs == form  # type: ignore[arg-type]
    for given, words in (
        ({}, "must have one of json, json_object, regex, choice, grammar, got none"),
        ({"json": {}, "regex": "a"}, "got json, regex"),
        ({"json": 3}, "json must be a JSON schema"),
        ({"choice": []}, "choice must be a list of texts"),
        ({"choice": "ab"}, "choice must be a list of texts"),
        ({"json_object": False}, "json_object must be True"),
        ({"jason": {}}, "jason"),
    ):
        with pytest.raises(InputError) as caught:
            StructuredOutputsParams(**given)
        assert words in str(caught.value)
    for more in ({"ignore_eos": True}, {"min_tokens": 3}):
        with pytest.raises(InputError, match="does not go with structured_outputs"):
            SamplingParams(structured_outputs=form, **more)
