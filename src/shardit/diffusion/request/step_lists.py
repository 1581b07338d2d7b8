"""Handles lists of noise levels or time steps, which determine the number of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

LISTS = ("sigmas", "timesteps")


def listed(given: Mapping[str, Any]) -> str | None:
    """Return the list among the given arguments, None if there is none."""
    return next((name for name in LISTS if given.get(name) is not None), None)


def steps_problem(given: Mapping[str, Any]) -> str | None:
    """Return the error if a number of steps and a list of another length are both given: pipelines would ignore the
    number."""
    name, steps = listed(given), given.get("num_inference_steps")
    values = None if name is None else given[name]
    if steps is None or not isinstance(values, Sized) or len(values) == steps:
        return None
    return f"num_inference_steps and {name} disagree ({steps} and {len(values)} entries); give one of them"
