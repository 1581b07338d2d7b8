"""Numbers of bytes, as people write them."""

from __future__ import annotations

import re
from typing import Any

from shardit.errors import InputError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def byte_size(name: str, value: Any) -> Any:
    """Return the number of bytes that a text such as "2GiB", "500MB" or "1024" states; other values stay as they are.
    Raises InputError that calls it `name`."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ki|mi|gi|k|m|g)?b?\s*", value.lower())
    count = 0 if found is None else int(float(found[1]) * _UNITS[found[2] or ""])
    if count < 1:
        raise InputError(f"{name} must be a number of bytes, as in 2GiB, 500MB or 1048576, got {value!r}")
    return count
