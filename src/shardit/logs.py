"""Structured logs: one JSON object per line on standard error, or readable lines on a terminal."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any


def logger(process: str) -> Any:
    """The log of one process of the server; `process` is "supervisor", "api" or "rank". Fields go in as keywords:
    request_id for a job, rank for a rank."""
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

    pretty = sys.stderr.isatty()
    # What clients send (paths, say) must not reach the terminal as escape sequences.
    readable = structlog.dev.ConsoleRenderer(repr_native_str=True) if pretty else None
    renderer: Any = readable or structlog.processors.JSONRenderer()
    return structlog.wrap_logger(
        _Lines(),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        process=process,
    )


def take_over(log: Any, fields: Callable[[], Mapping[str, Any]] = dict) -> None:
    """From now on, what libraries log and warn of are lines of `log`, with `fields` of that moment. Libraries that set
    up their loggers when they are imported must have been."""
    handler = logging.Handler()

    def emit(record: logging.LogRecord) -> None:
        say = getattr(log, record.levelname.lower(), log.warning)
        say("library", logger=record.name, text=record.getMessage(), **fields())

    handler.emit = emit  # type: ignore[method-assign]
    logging.captureWarnings(True)
    logging.getLogger().handlers = [handler]
    for name in ("diffusers", "transformers"):  # which have handlers of their own
        library = logging.getLogger(name)
        library.handlers, library.propagate = [], True


class _Lines:
    """Writes each line in one piece, so that lines of several processes do not mix. Where nobody reads any more, or
    the disk is full, the work goes on."""

    def msg(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    debug = info = warning = error = critical = msg
