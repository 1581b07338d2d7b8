"""Variables of the environment that switch something on or off, and the number of threads."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping

from shardit.errors import InputError
from shardit.settings.checks import text_as_flag

DEBUG, PROGRESS = "SHARDIT_DEBUG", "SHARDIT_PROGRESS"
KNOWN = (
    *(DEBUG, PROGRESS, "SHARDIT_ALLOW_DEVICE", "SHARDIT_API_KEY", "SHARDIT_CACHE", "SHARDIT_DATA_DIR", "SHARDIT_HOST"),
    *("SHARDIT_LOG_FORMAT", "SHARDIT_PORT", "SHARDIT_PP_LAYER_PARTITION", "SHARDIT_RAY_WAIT"),
)
"""All variables of ours."""
ALMOST = 0.85
"""Likeness from which a name is a misspelt one of ours. Others may be those of a cluster, such as
SHARDIT_SERVICE_HOST."""


def switch(name: str, environ: Mapping[str, str], default: bool) -> bool:
    """Return whether a variable is on; `default` if it is unset or empty. Raises InputError."""
    text = environ.get(name, "").strip()
    found = {"": default, "0": False, "1": True}.get(text, text_as_flag(text))
    if not isinstance(found, bool):
        raise InputError(f"{name} must be 0 or 1 (or false, true, no, yes), got {text!r:.200}; correct or unset it")
    return found


def threads_asked(environ: Mapping[str, str]) -> int | None:
    """Return the threads of a rank that OMP_NUM_THREADS asks for; None if it is not set. Raises InputError."""
    text = environ.get("OMP_NUM_THREADS", "").strip()
    wish = text.partition(",")[0].strip()  # further numbers are for nested regions
    if text and not (wish.isdecimal() and int(wish) > 0):
        raise InputError(f"OMP_NUM_THREADS must be a whole number of at least 1, got {text!r}; correct or unset it")
    return int(wish) if text else None


def check_environment() -> None:
    """Raise InputError for a variable of this file with a wrong value, and for a misspelt name: before torch, which
    takes seconds, is imported and has another error text."""
    for name in sorted(name for name in os.environ if name.startswith("SHARDIT_") and name not in KNOWN):
        if near := difflib.get_close_matches(name, KNOWN, 1, ALMOST):
            raise InputError(f"{name} in the environment is not known; did you mean {near[0]}? Correct or unset it")
    for name in (DEBUG, PROGRESS):
        switch(name, os.environ, default=True)
    threads_asked(os.environ)
