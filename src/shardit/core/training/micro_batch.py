"""The contents of micro-batches, which may be anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def tree_of(value: Any) -> Any:
    """Return a micro-batch as dicts and lists, down to its tensors: mappings and dataclasses of libraries, too."""
    if isinstance(value, Mapping):
        return {key: tree_of(one) for key, one in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: tree_of(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [tree_of(one) for one in value]
    return value
