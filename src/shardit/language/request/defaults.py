"""The sampling that the generation configuration of a model recommends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Names of sampling parameters that generation configurations have, too."""


def recommended(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `SamplingParams` from the values of a generation configuration."""
    chosen = {name: own[name] for name in DEFAULTS if own.get(name) is not None}
    return chosen if own.get("do_sample") else {**chosen, "temperature": 0.0}
