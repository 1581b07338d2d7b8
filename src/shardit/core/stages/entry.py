"""The entry of a model that denoises: checks before its call begins, on every rank."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from torch import nn

from shardit.core.modules.patching import subclass_in_place
from shardit.core.plans.known_plans import MAX_SIGNATURES
from shardit.core.runtime.call_signature import signature
from shardit.core.runtime.digests import named
from shardit.core.runtime.pending import settle
from shardit.core.stages.runtime import Runtime

_inside: ContextVar[nn.Module | None] = ContextVar("shardit_entered", default=None)
"""The model whose call runs, in this context."""


def guard_entry(
    model: nn.Module, runtime: Runtime, begin: Callable[[], Mapping[str, Any]], end: Callable[[], None]
) -> None:
    """Compare, in place, what ranks give to a model: the first call of each pipeline call, and of a model that is used
    by itself the first call of each signature.

    begin, end: called before and after a call of the model by itself (pipelines do so themselves); what `begin`
    returns is compared, too.
    """
    cls, known = type(model), {}
    own_call, forward = cls.__call__, cls.forward

    def compare(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        alike = begin()
        key = signature((args, kwargs), model.training), tuple(map(str, alike.items()))
        if key not in known:
            runtime.agreement.compare(cls.__name__, {**named(forward, args, kwargs), **alike})
            known[key] = None
            if len(known) > MAX_SIGNATURES:
                known.pop(next(iter(known)))

    @functools.wraps(own_call)
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _inside.get() is self:  # the forward calls the model itself
            return own_call(self, *args, **kwargs)
        token, alone = _inside.set(self), not runtime.in_pipeline
        try:
            settle((args, kwargs))
            if alone:
                compare(args, kwargs)
            else:
                runtime.mark_start(cls.__name__, lambda: named(forward, args, kwargs))
            return own_call(self, *args, **kwargs)
        finally:
            _inside.reset(token)
            if alone:
                end()

    subclass_in_place(model, {"__call__": __call__})
