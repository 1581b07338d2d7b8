"""Keeps the libraries from drawing one progress bar per rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the loading bars of diffusers and transformers, and the warning about modules that are passed in, as ours
    are."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    log = logging.getLogger("diffusers.pipelines.pipeline_loading_utils")
    with ExitStack() as undo:
        for library in (diffusers_logging, transformers_logging):
            undo.enter_context(_no_bar(library))
        log.addFilter(_not_about_passing)
        undo.callback(log.removeFilter, _not_about_passing)
        yield


@contextmanager
def _no_bar(library: Any) -> Iterator[None]:
    shown = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bar()


def _not_about_passing(record: logging.LogRecord) -> bool:
    return "You have passed a non-standard module" not in record.getMessage()
