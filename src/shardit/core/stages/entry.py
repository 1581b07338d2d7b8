"""The entries of a pipeline and of the models that denoise in it: ranks begin their calls alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from shardit.core.comm.p2p import Comm
from shardit.core.modules.compiled import refuse_compiling
from shardit.core.modules.patching import subclass_in_place
from shardit.core.plans.known_plans import MAX_SIGNATURES
from shardit.core.runtime.digests import named
from shardit.core.runtime.flat_call import FlatCall
from shardit.core.runtime.no_gradients import refuse_gradients
from shardit.core.runtime.pending import materialize, materialize_leaves
from shardit.core.stages.runtime import Runtime
from shardit.errors import InputError

Forward = Callable[..., Any]

inside: ContextVar[nn.Module | None] = ContextVar("shardit_inside", default=None)
"""The model whose call runs, in this context."""


def pipeline_entry(
    own_call: Forward,
    runtime: Runtime,
    begin: Callable[[Any], Mapping[str, Any]],
    settings: Callable[[Any], Mapping[str, Any]],
    share: Callable[[Any, tuple[Any, ...], dict[str, Any], Comm], dict[str, Any]],
    end: Callable[[Any], None],
) -> Forward:
    """Return a pipeline's `__call__` that ranks begin alike, and whose results are plain tensors.

    begin: given the pipeline before anything else happens; what it returns is compared with the arguments. If it
    refuses on some ranks, all of them raise. settings: returns what is compared, too. share: returns the keyword
    arguments with callbacks that all ranks share. end: given the pipeline after the call, however that went.
    """

    def __call__(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            alike, refusal = begin(pipe), None
        except InputError as error:
            alike, refusal = {f"parts ({error})": None}, error
        with runtime.pipeline_call(
            type(pipe).__name__, lambda: {**named(own_call, args, kwargs), **settings(pipe), **alike}
        ):
            if refusal is not None:
                raise refusal
            kwargs = share(pipe, args, kwargs, runtime.replica)
            try:
                out = own_call(pipe, *args, **kwargs)
            finally:
                end(pipe)
            materialize(out)
        return out

    return __call__


class ModelEntry:
    """The interceptor of the calls of a model, outside all others. run: makes a call, given the model's own `__call__`;
    None: as the model does itself."""

    def __init__(self, model: nn.Module, run: Callable[[Forward, FlatCall], Any] | None = None):
        self._name, self._forward = type(model).__name__, type(model).forward
        self._runtime: Runtime | None = None
        self._known: dict[Any, None] = {}
        own_call = type(model).__call__

        @functools.wraps(own_call)
        def __call__(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            refuse_compiling(self._name, torch.compiler.is_compiling())
            if inside.get() is model:  # the forward calls the model itself
                return own_call(model, *args, **kwargs)
            with nullcontext() if self._runtime is None else self._runtime.turn():
                token = inside.set(model)
                watched = self._runtime is not None and self._runtime.watches
                try:
                    materialize_leaves((call := FlatCall.of(args, kwargs)).leaves)
                    call = call.safe() if watched else call
                    if self._runtime is not None:
                        if not self._runtime.mesh.keeps_graph:
                            refuse_gradients(model, call.leaves)
                        self._compare(self._runtime, model, call)
                    own = own_call.__get__(model)
                    return run(own, call) if run is not None else own(*call.args, **call.kwargs)
                finally:
                    inside.reset(token)
                    if watched:
                        self._end()

        subclass_in_place(model, {"__call__": __call__, "shardit_entry": property(lambda model: self)})

    def compare_inputs(self, runtime: Runtime, begin: Callable[[], Mapping[str, Any]], end: Callable[[], None]) -> None:
        """Compare from now on what ranks give to the model: in the first call of each pipeline call, and, of a model
        that is used alone, in the first call of each signature.

        begin, end: called before and after a call if code of users may have run since the last one, or will
        (pipelines do so themselves); what `begin` returns of a model that is used alone is compared, too.
        """
        self._runtime, self._begin, self._end = runtime, begin, end
        runtime.models.append((begin, end))

    def _arguments(self, call: FlatCall) -> dict[str, Any]:
        """Return the arguments of a call by name, as they were given: a forward may have emptied lists since."""
        given = call.again()
        return named(self._forward, given.args, given.kwargs)

    def _compare(self, runtime: Runtime, model: nn.Module, call: FlatCall) -> None:
        alike = self._begin() if runtime.watches else {}
        if runtime.in_pipeline:
            runtime.mark_start(self._name, lambda: self._arguments(call))
            return
        key = call.signature(model.training), tuple(map(str, alike.items()))
        if key not in self._known:
            runtime.agreement.compare(self._name, {**self._arguments(call), **alike})
            self._known[key] = None
            if len(self._known) > MAX_SIGNATURES:
                self._known.pop(next(iter(self._known)))


def entry_of(model: nn.Module) -> ModelEntry:
    """Return the entry of a model; it gets one if it has none."""
    return getattr(model, "shardit_entry", None) or ModelEntry(model)
