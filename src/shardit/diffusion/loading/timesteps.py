"""Tests whether a scheduler accepts a pipeline's call before the first step, by trying it on a copy."""

from __future__ import annotations

import ast
import inspect
import math
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shardit.errors import first_line

_STEPS = 4
_CALLS = ("retrieve_timesteps", "set_timesteps")


@dataclass(frozen=True)
class TimestepArguments:
    """Arguments that a pipeline passes to `set_timesteps` besides the number of steps, and what else it calls of its
    scheduler, read from the source of its `__call__`."""

    sigmas: bool = False
    """Sigmas of its own, regardless of the user's arguments."""
    array: bool = False
    """These sigmas are a numpy array; schedulers may calculate with one that could not with a list."""
    flow_sigmas: bool = False
    """But none for schedulers that have `use_flow_sigmas`."""
    mu: bool = False
    """The shift for the size of the image."""
    methods: tuple[str, ...] = ()
    """Methods of the scheduler that every call uses."""


def arguments_of(pipeline_class: Any) -> TimestepArguments:
    """Return the arguments of pipelines of this class; none if they cannot be read."""
    try:
        return arguments_in(textwrap.dedent(inspect.getsource(pipeline_class.__call__)))
    except (OSError, TypeError, AttributeError, SyntaxError):
        return TimestepArguments()


def arguments_in(source: str) -> TimestepArguments:
    """Return the arguments in the source of a `__call__`."""
    tree = ast.parse(source)
    names = {keyword.arg for call in _calls(tree) for keyword in call.keywords if not _is_none(keyword.value)}
    assigned = (node for node in ast.walk(tree) if isinstance(node, ast.Assign) and not _is_none(node.value))
    made = [ast.unparse(node.value) for node in assigned if any(ast.unparse(x) == "sigmas" for x in node.targets)]
    return TimestepArguments(
        sigmas="sigmas" in names and bool(made),
        array=any(re.search(r"\b(np|numpy)\.", value) for value in made),
        flow_sigmas="use_flow_sigmas" in source,
        mu="mu" in names,
        methods=tuple(sorted(set(_methods(tree)))),
    )


def problem(scheduler: Any, asked: TimestepArguments) -> str:
    """Return the error of a copy of a scheduler when it is called as by a pipeline, that its steps are not numbers, or
    which method it lacks; "" if it succeeds."""
    if lacking := [name for name in asked.methods if not hasattr(scheduler, name)]:
        return f"it has no {lacking[0]}"
    given: dict[str, Any] = {"mu": 1.0} if asked.mu else {}
    if asked.sigmas and not (asked.flow_sigmas and scheduler.config.get("use_flow_sigmas")):
        sigmas = [1 - step / _STEPS for step in range(_STEPS)]
        import numpy

        given["sigmas"] = numpy.array(sigmas) if asked.array else sigmas
    else:
        given["num_inference_steps"] = _STEPS
    try:
        copy = type(scheduler).from_config(scheduler.config)
        copy.set_timesteps(device="cpu", **given)
    except Exception as error:  # any of these would end the pipeline
        return f"{type(error).__name__}: {first_line(error)}"
    steps = {name: getattr(copy, name, None) for name in ("sigmas", "timesteps")}
    wrong = [name for name, values in steps.items() if _is_broken(values)]
    return f"its {wrong[0]} are not finite numbers" if wrong else ""


def _is_broken(values: Any) -> bool:
    """Return whether values in a tensor or an array are not all finite numbers."""
    return getattr(values, "ndim", 0) == 1 and not math.isfinite(float(sum(values)))


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Call) and name in _CALLS:
            yield node


def _methods(node: ast.AST) -> Iterator[str]:
    """Yield the methods of `self.scheduler` that are called under no condition: a pipeline does without the others, or
    asks first whether there are any."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.If, ast.IfExp, ast.BoolOp, ast.Try)):
            continue
        called = child.func if isinstance(child, ast.Call) else None
        if isinstance(called, ast.Attribute) and ast.unparse(called.value) == "self.scheduler":
            yield called.attr
        yield from _methods(child)


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None
