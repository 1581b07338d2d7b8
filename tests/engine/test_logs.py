"""Lines of the log."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from shardit import logs


@pytest.fixture
def _loggers_as_before() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in (None, "diffusers", "transformers")]
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)  # other tests may have changed it
    yield
    logging.captureWarnings(False)
    for logger, handlers, propagate, level in before:
        logger.handlers, logger.propagate, logger.level = handlers, propagate, level


@pytest.mark.usefixtures("_loggers_as_before")
def test_library_messages_are_log_lines_with_rank_and_request(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("diffusers").addHandler(logging.StreamHandler())  # as diffusers does
    turn = {"request_id": "image_1"}
    logs.take_over(logs.logger("rank").bind(rank=3), lambda: turn)
    logging.getLogger("diffusers.pipelines.some").warning("%s is rounded\nto 16", "height")
    turn = {}
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", FutureWarning, stacklevel=1)
    logging.getLogger("any").error("broken")
    logging.getLogger("any").info("not worth a line")
    said: list[dict[str, Any]] = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["process"], line["rank"], line["event"]) for line in said] == [("rank", 3, "library")] * 3
    assert said[0]["text"] == "height is rounded\nto 16"
    assert [line.get("request_id") for line in said] == ["image_1", None, None]
    assert "FutureWarning: old" in said[1]["text"]
    assert [line["level"] for line in said] == ["warning", "warning", "error"]


@pytest.mark.usefixtures("_loggers_as_before")
def test_a_message_that_a_library_repeats_is_logged_once_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    request = {"request_id": "image_1"}
    logs.take_over(logs.logger("api"), lambda: request)
    for _ in range(100):
        logging.getLogger("asyncio").error("socket.accept() out of system resource")
    request = {"request_id": "image_2"}
    logging.getLogger("asyncio").error("socket.accept() out of system resource")
    logging.getLogger("asyncio").error("another")
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["request_id"] for line in said] == ["image_1", "image_2", "image_2"]
    assert said[2]["text"] == "another"


def test_nothing_that_a_client_sends_reaches_the_terminal_raw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    logs._log.cache_clear()
    try:
        logs.logger("api").info("answered", path="/\x1b]0;evil\x07", status=404)
        logs.logger("api").error("error", error="one\ntwo\x9b31m")
        said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    finally:
        logs._log.cache_clear()
    assert r"/\x1b]0;evil\x07" in said
    assert r"one\ntwo\x9b31m" in said
    assert len(said.splitlines()) == 2


def line_in(chosen: str, stderr: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setenv(logs.FORMAT_VARIABLE, chosen)
    logs._log.cache_clear()
    try:
        logs.logger("supervisor").info("job_started", request_id="image_1", seconds=1.5)
    finally:
        logs._log.cache_clear()
    return stderr.getvalue()


def test_forms_of_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen, stderr in (("json", Terminal()), ("auto", io.StringIO()), ("json", io.StringIO())):
        assert json.loads(line_in(chosen, stderr, monkeypatch))["event"] == "job_started"
    plain = line_in("text", io.StringIO(), monkeypatch)
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d supervisor +\[info *\] job_started +request_id='image_1' seconds=1.5\n", plain
    ), plain
    for chosen in ("text", "auto"):
        coloured = line_in(chosen, Terminal(), monkeypatch)
        assert "\x1b[" in coloured
        assert re.sub(r"\x1b\[\d+m", "", coloured).split()[1:] == plain.split()[1:]


class Terminal(io.StringIO):
    """A terminal, as far as it can be asked."""

    def isatty(self) -> bool:
        return True
