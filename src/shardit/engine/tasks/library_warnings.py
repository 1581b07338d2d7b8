"""Collects the warnings of a library for one request."""

from __future__ import annotations

import logging
from collections.abc import Callable

from shardit.errors import first_filled_line

LONGEST_WARNING = 200
"""Characters of a warning that becomes a note."""


class warnings_of:
    """Collects the warnings of a library's loggers while a request has its turns, one line each (rounded sizes, for
    example). `listening` returns whether it is this request's turn. The library does not print them meanwhile: they
    become notes, or are printed at the end if the request fails."""

    def __init__(self, library: str, listening: Callable[[], bool]):
        self._logger = logging.getLogger(library)
        self._handler = logging.Handler(logging.WARNING)
        self._handler.emit = self._keep  # type: ignore[method-assign]
        self._listening = listening
        self._theirs: list[logging.Handler] = []
        self.lines: list[str] = []

    def _keep(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        line = first_filled_line(text)
        if line.endswith(":"):  # it announces the next one
            line = f"{line} {first_filled_line(text.partition(line)[2])}".rstrip(": ")
        if len(line) > LONGEST_WARNING:  # some repeat the whole prompt
            line = f"{line[:LONGEST_WARNING]}..."
        if line and self._listening() and line not in self.lines:
            self.lines.append(line)

    def _is_not_kept(self, record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING or not self._listening()

    def __enter__(self) -> warnings_of:
        self._theirs = list(self._logger.handlers)
        for handler in self._theirs:
            handler.addFilter(self._is_not_kept)
        self._logger.addHandler(self._handler)
        return self

    def __exit__(self, _: object, error: object, __: object) -> None:
        self._logger.removeHandler(self._handler)
        for handler in self._theirs:
            handler.removeFilter(self._is_not_kept)
        for line in self.lines if error is not None else ():
            self._logger.warning("%s", line)
