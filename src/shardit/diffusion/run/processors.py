"""Attention processors that a pipeline sets only during its call, as perturbed attention guidance does."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from shardit.errors import InputError


def check_in_flight(pipeline_class: Any, max_in_flight: int) -> None:
    """Raise InputError if concurrent requests would share a model that the pipeline changes only during its call, as
    perturbed attention guidance does."""
    if max_in_flight > 1 and sets_processors(pipeline_class):
        raise InputError(
            f"max_in_flight={max_in_flight}: {pipeline_class.__name__} sets attention processors during its call, of a "
            "model that requests share; use max_in_flight=1 (--max-in-flight 1)"
        )


def sets_processors(pipeline_class: Any) -> bool:
    """Return whether the call of a pipeline sets attention processors of its models."""
    code = getattr(inspect.unwrap(pipeline_class.__call__), "__code__", None)
    return "set_attn_processor" in getattr(code, "co_names", ())


@contextmanager
def processors_put_back(pipe: Any) -> Iterator[None]:
    """Restore the attention processors that a call sets temporarily, if it ends before it does so itself: the next
    request would compute with them."""
    if not sets_processors(type(pipe)):
        yield
        return
    modules = [part for one in pipe.components.values() if isinstance(one, nn.Module) for part in one.modules()]
    before = [(part, part.processor) for part in modules if hasattr(part, "processor")]
    try:
        yield
    except BaseException:
        for part, processor in before:
            part.processor = processor
        raise
