"""Numbers of bytes, as people write them."""

from __future__ import annotations

import re
from typing import Any

from shardit.settings.checks import is_number, matching

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def byte_size(value: Any) -> int:
    """Return the number of bytes that a value states: a number, or a text such as "2GiB", "500MB" or "1024". 0 for a
    value that states none."""
    if not isinstance(value, str):
        return int(value) if is_number(value) and value == int(value) else 0
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ki|mi|gi|k|m|g)?b?\s*", value.lower())
    return 0 if found is None else int(float(found[1]) * _UNITS[found[2] or ""])


BYTES = matching("a number of bytes, as in 2GiB, 500MB or 1048576", lambda value: byte_size(value) >= 1)
"""The check of a number of bytes."""
