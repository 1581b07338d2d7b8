"""Structured logs on standard error: one JSON object per line, or readable lines with colours on a terminal."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

FORMAT_VARIABLE = "SHARDIT_LOG_FORMAT"
"""The variable by which the processes of a server know the form of their lines: "auto", "text" or "json"."""

_REPEAT_S = 1.0
"""A message that a library repeats is logged once in this many seconds."""


def logger(process: str) -> Any:
    """Return the log of one process of the server; `process` is "supervisor", "api" or "rank". Fields go in as
    keywords: request_id for a job, rank for a rank."""
    return _Later(process)


class _Later:
    """A log that is made when it is first used."""

    def __init__(self, process: str):
        self._process = process

    def __getattr__(self, name: str) -> Any:
        return getattr(_log(self._process), name)


@functools.cache
def _log(process: str) -> Any:
    import structlog  # takes a tenth of a second, which a starting server has not

    chosen = os.environ.get(FORMAT_VARIABLE) or "auto"
    if chosen == "text" or (chosen == "auto" and sys.stderr.isatty()):
        times, renderer = structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False), _readable()
    else:
        times, renderer = structlog.processors.TimeStamper(fmt="iso", utc=True), structlog.processors.JSONRenderer()
    return structlog.wrap_logger(
        _Lines(), processors=[structlog.processors.add_log_level, times, renderer], process=process
    )


def _readable() -> Any:
    """Lines of time, process, level, event and fields."""
    from structlog import dev

    colours = sys.stderr.isatty()
    styles = dev.ConsoleRenderer.get_default_level_styles(colors=colours)
    dim, bright, key, reset = (dev.DIM, dev.BRIGHT, dev.CYAN, dev.RESET_ALL) if colours else ("", "", "", "")

    def column(style: str, width: int, show: Callable[[object], str] = str) -> Any:
        return dev.KeyValueColumnFormatter(
            key_style=None, value_style=style, reset_style=reset, value_repr=show, width=width
        )

    # What clients send (paths, say) must not reach the terminal as escape sequences: fields are shown by their repr.
    return dev.ConsoleRenderer(
        columns=[
            dev.Column("timestamp", column(dim, 0)),
            dev.Column("process", column(bright, 10)),
            dev.Column("level", dev.LogLevelColumnFormatter(level_styles=styles, reset_style=reset, width=7)),
            dev.Column("event", column(bright, 24)),
            dev.Column("", dev.KeyValueColumnFormatter(key, "", reset, value_repr=repr)),
        ]
    )


def take_over(log: Any, fields: Callable[[], Mapping[str, Any]] = dict) -> None:
    """From now on, what libraries log and warn of are lines of `log`, with `fields` of that moment; a message that a
    library repeats is logged once a second. Libraries that set up their loggers when they are imported must have been.
    """
    handler = logging.Handler()
    last: dict[str, Any] = {}
    next_repeat = 0.0

    def emit(record: logging.LogRecord) -> None:
        nonlocal last, next_repeat
        line = {"logger": record.name, "text": record.getMessage(), **fields()}
        # asyncio reports each of 2,000 connections that it cannot accept if the process has no file handle left.
        if line == last and record.created < next_repeat:
            return
        last, next_repeat = line, record.created + _REPEAT_S
        say = getattr(log, record.levelname.lower(), log.warning)
        say("library", **line)

    handler.emit = emit  # type: ignore[method-assign]
    logging.captureWarnings(True)
    logging.getLogger().handlers = [handler]
    for name in ("diffusers", "transformers"):  # which have handlers of their own
        library = logging.getLogger(name)
        library.handlers, library.propagate = [], True


class _Lines:
    """Writes each line in one piece, so that lines of several processes do not mix. If nobody reads any more, or
    the disk is full, the work goes on."""

    def msg(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    debug = info = warning = error = critical = msg
