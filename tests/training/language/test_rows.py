"""Rows of JSONL and text files: what is read, and errors with file and line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from shardit import InputError
from shardit.training.language.rows import read_rows

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def lines(*values: object) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in values).encode()


PART = {"type": "text", "text": "a"}


def chat_row(content: object, **more: object) -> bytes:
    """A row with one message."""
    return lines({"messages": [{"role": "user", "content": content, **more}]})


def test_messages_become_those_that_templates_expect(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    (tmp_path / "a.jsonl").write_bytes(
        chat_row([PART, {"type": "text", "text": "b"}]) + chat_row(None, tool_calls=[call], refusal=None)
    )
    parts, calls = read_rows("data", str(tmp_path / "a.jsonl")).rows
    assert parts.messages == [{"role": "user", "content": "ab"}]
    function = {"name": "f", "arguments": {"a": 1}}
    assert calls.messages == [
        {"role": "user", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    ]


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "z.txt").write_bytes(b"\xef\xbb\xbfa text\r\nof two lines")
    (tmp_path / "b" / "a.jsonl.gz").write_bytes(gzip.compress(lines({"text": "one"}, CHAT)))
    (tmp_path / "c.jsonl").write_bytes(
        b"\n" + lines({"text": "a\u2028b"}) + b"\r\n" + lines({"text": " "}, {"text": "last"})
    )
    (tmp_path / "notes.md").write_text("not data")
    (tmp_path / ".DS_Store").write_text("not data")
    (tmp_path / ".hidden" / "a.txt").write_text("not data")
    found = read_rows("data", str(tmp_path))
    assert [(row.name, row.text) for row in found.rows] == [
        ("b/a.jsonl.gz:1", "one"),
        ("b/a.jsonl.gz:2", None),
        ("b/z.txt", "a text\r\nof two lines"),
        ("c.jsonl:2", "a\u2028b"),
        ("c.jsonl:5", "last"),
    ]
    assert found.rows[1].messages == CHAT["messages"]
    assert found.empty == ["c.jsonl:4"]
    assert found.others == ["notes.md"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_other_encodings_with_their_marks_are_read(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "žluť"}\n{"text": "b"}'.encode(encoding))
    assert [row.text for row in read_rows("data", str(tmp_path / "a.jsonl")).rows] == ["žluť", "b"]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b'{"text": "a"}\n{"text": "b"', ("a.jsonl:2", "not JSON")),
        (b'{"text": "a"}\n\n{"text": "it\x92s"}', ("a.jsonl:3", "0x92", "UTF-8")),
        (b'["a"]', ("a.jsonl:1", '{"text": ...}')),
        (b'{"texts": "a"}', ("a.jsonl:1", "neither text nor messages", "did you mean 'text'")),
        (b'{"text": "a", "messages": []}', ("a.jsonl:1", "both text and messages")),
        (b'{"text": 5}', ("a.jsonl:1", "must be a string")),
        (b'{"messages": "hello"}', ("a.jsonl:1", "must be a list")),
        (b'{"text": "a"}\n{"text": "\\ud800"}', ("a.jsonl:2", "half characters")),
        (b'{"messages": [{"role": "user", "content": "\\udc00"}]}', ("a.jsonl:1", "half characters")),
        (b'{"messages": [{"role": "user", "content": "a"}], "tools": ["\\ud800"]}', ("a.jsonl:1", "half characters")),
        (chat_row([PART, {"type": "image_url", "image_url": {}}]), ("a.jsonl:1: messages[0].content[1]", "text only")),
        (chat_row(["a"]), ("a.jsonl:1: messages[0].content[0] must be",)),
        (chat_row("a", tool_calls=[{"name": "f"}]), ("a.jsonl:1: messages[0].tool_calls[0] must be",)),
        (b'{"text": null}', ("a.jsonl:1", "neither text nor messages")),
        (b"", ("no row with content",)),
        (b'{"text": ""}\n{"messages": []}', ("no row with content", "2 are empty")),
        (b"[" * 100_000, ("a.jsonl:1", "not JSON")),
        (b"\xff\xfeabc", ("a.jsonl", "UTF-16")),
    ],
)
def test_wrong_rows_are_errors_with_file_and_line(tmp_path: Path, content: bytes, parts: tuple[str, ...]) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError) as error:
        read_rows("data", str(tmp_path / "a.jsonl"))
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_errors(tmp_path: Path) -> None:
    whole = gzip.compress(lines(*[{"text": str(number)} for number in range(1000)]))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    for name, part in (
        ("a.jsonl.gz", "a.jsonl.gz cannot be read"),
        ("b.jsonl.gz", "b.jsonl.gz cannot be read"),
        ("a.csv", ".jsonl.gz"),
        ("empty", "has no file for a language model"),
        ("absent", "there is no file or folder"),
    ):
        with pytest.raises(InputError, match=part):
            read_rows("data", str(tmp_path / name))


def test_file_names_that_are_not_utf8_are_written_out(tmp_path: Path) -> None:
    """So that metrics, checkpoints and messages between ranks can have them."""
    for name in (b"\xff.txt", "a\u2028b.txt".encode(), b"\xfe.csv"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_text("hello")
    found = read_rows("data", str(tmp_path))
    assert [row.name for row in found.rows] == ["a\\u2028b.txt", "\\xff.txt"]
    assert found.others == ["\\xfe.csv"]
    assert json.dumps(found.rows[1].name, ensure_ascii=False).encode()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")).write_text("{")
    with pytest.raises(InputError) as raised:
        read_rows("data", str(tmp_path))
    assert str(raised.value).startswith("\\xff.jsonl:1 is not JSON")
