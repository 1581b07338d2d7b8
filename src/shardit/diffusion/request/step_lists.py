"""Handles lists of noise levels or time steps, which determine the number of steps."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence, Sized
from typing import Any

STEPS, LISTS = "num_inference_steps", ("sigmas", "timesteps")


def listed(given: Mapping[str, Any]) -> str | None:
    """Return the list among the given arguments, None if there is none."""
    return next((name for name in LISTS if given.get(name) is not None), None)


def replaced_steps(record: Mapping[str, Any], given: Collection[str]) -> Sequence[str]:
    """Return the entries of a file's record that state its steps and do not count: all if the user has given steps in
    any form, the number if there is a list."""
    if not {STEPS, *LISTS}.isdisjoint(given):
        return (STEPS, *LISTS)
    return (STEPS,) if listed(record) else ()


def steps_problem(given: Mapping[str, Any]) -> str | None:
    """Return the error if a number of steps and a list of another length are both given: pipelines would ignore the
    number."""
    name, steps = listed(given), given.get(STEPS)
    values = None if name is None else given[name]
    if steps is None or not isinstance(values, Sized) or len(values) == steps:
        return None
    return f"{STEPS} and {name} disagree ({steps} and {len(values)} entries); give one of them"


def refused_lists(names: Collection[str], scheduler: Any, source: str) -> dict[str, str]:
    """Return the errors for lists that a pipeline takes and its scheduler does not, by name. names: arguments of the
    pipeline. source: of its module, which passes the lists on with a function of diffusers, or does not."""
    method = getattr(type(scheduler), "set_timesteps", None)
    if method is None or "retrieve_timesteps" not in source:
        return {}
    taken, own = inspect.signature(method).parameters, type(scheduler).__name__
    advice = "leave it out, or choose another scheduler (--scheduler)"
    return {name: f"{name}: {own} takes none; {advice}" for name in LISTS if name in names and name not in taken}
