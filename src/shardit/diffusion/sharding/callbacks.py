"""Callbacks and interrupts between the steps of a pipeline, with the same outcome on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shardit.core.comm.barrier import sendable
from shardit.core.comm.p2p import Comm
from shardit.core.components.owned import call_on
from shardit.core.modules.patching import plain_class
from shardit.core.runtime.pending import materialize
from shardit.core.runtime.randomness import Generator, States, generators_in, moved, set_states, states
from shardit.core.runtime.versions import version_of
from shardit.errors import InputError, UnsupportedError

CALLBACK, INPUTS = "callback_on_step_end", "callback_on_step_end_tensor_inputs"


def shared_callback(
    pipe: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    ranks: Comm,
    begin: Callable[[Any], Mapping[str, Any]],
    end: Callable[[Any], None],
) -> dict[str, Any]:
    """Return the keyword arguments of a pipeline's call, with a callback that has the same outcome on all of `ranks`.

    Each rank runs its own callback. The tensors and random generators of rank 0 are used, an interrupt of any rank
    stops all ranks at this step, and an error of any rank is raised on all. Changes of models take effect in later
    calls: `end` is called with the pipeline before the callback and `begin` after it, as around a call.
    """
    callback, runtime = kwargs.get(CALLBACK), pipe.shardit_runtime
    pipe.__dict__.update(_has_callback=callback is not None, _interrupt_requested=False)
    runtime.has_user_code |= runs_user_code(pipe, args, kwargs)
    if callback is None or isinstance(callback, SharedCallback):  # of a pipeline that calls this one
        return kwargs
    asked = {INPUTS: callback.tensor_inputs} if hasattr(callback, "tensor_inputs") else {}
    shared = SharedCallback(callback, pipe, ranks, generators_in((args, kwargs)), begin, end)
    return {**kwargs, **asked, CALLBACK: shared}


@dataclass
class SharedCallback:
    """A callback that all of `ranks` run. called: the pipeline that was called, which may run the steps in another one.
    generators: random generators among its arguments."""

    callback: Callable[..., Any]
    called: Any
    ranks: Comm
    generators: list[Generator]
    begin: Callable[[Any], Mapping[str, Any]]
    end: Callable[[Any], None]

    def __call__(self, pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Run the callback and return the tensors with which all ranks continue. Collective."""
        materialize(given)
        self.called.shardit_runtime.schedule.drain()
        self.end(self.called)
        device, made = self.ranks.group.device, dict[str, Any]()
        before = {name: (value, version_of(value)) for name, value in given.items()}
        drawn, alike, error = states(device, self.generators), {}, None
        failed: Exception | None = None
        try:
            made = self.callback(pipe, step, timestep, given)
            if not isinstance(made, dict):
                raise InputError(f"{CALLBACK} must return a dict of tensors, as it is given one, not {made!r}")
            alike = self.begin(self.called)
        except Exception as failure:
            made, failed, error = {}, failure, sendable(failure)
        changed = [name for name in {**before, **made} if _changed(name, before, made)]
        interrupt = getattr(pipe, "_interrupt", False) or pipe.__dict__.get("_interrupt_requested", False)
        after = states(device, self.generators)
        outcome = Outcome(error, interrupt, changed, moved(drawn, after), list(made), dict(alike))
        gathered = self.ranks.group.gather_objects(outcome)
        # Only the draws of rank 0's callback are kept: those of other ranks are undone.
        back = {name: drawn[name] for name in moved(drawn, after)} | gathered[0].drawn
        set_states(back, device, self.generators)
        _raise_together(gathered, failed)
        materialize(made)  # on every rank: results of components that a callback has called
        if any(one.interrupt for one in gathered):
            pipe.__dict__["_interrupt"] = True
        known, kept = {name for one in gathered for name in one.changed}, gathered[0].made
        news = call_on(self.ranks, 0, lambda: {n: made[n] for n in kept if n in known}) if known else {}
        return {name: news[name] if name in known else made[name] for name in kept}


@dataclass
class Outcome:
    """Outcome of a callback on one rank: its error, whether it interrupts, the names of tensors that it changed, the
    generators that it advanced, the names of the tensors that it returned, and changes that must be equal on all
    ranks."""

    error: Exception | None
    interrupt: bool
    changed: list[str]
    drawn: States
    made: list[str]
    alike: dict[str, Any]


def _raise_together(gathered: list[Outcome], failed: Exception | None) -> None:
    """Raise the error of any rank on every rank, or InputError if models were changed on some ranks only. failed: the
    error of this rank, which is raised as it is if it is the same."""
    for one in gathered:
        if one.error is not None:
            own = failed is not None and str(sendable(failed)) == str(one.error)
            raise failed if failed is not None and own else one.error
    names = dict.fromkeys(name for one in gathered for name in one.alike)
    wrong = [name for name in names if any(one.alike.get(name) != gathered[0].alike.get(name) for one in gathered)]
    if wrong:
        raise InputError(f"ranks differ in {', '.join(wrong)} after {CALLBACK}: make the same changes on every rank")


def runs_user_code(pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether user code runs between model calls, apart from the shared callback: in a user's own pipeline, or
    in a modular one, whose guiders change models."""
    own = not plain_class(pipe).__module__.startswith("diffusers.pipelines.")
    return own or any(map(callable, (*args, kwargs.get("callback"))))


def _changed(name: str, before: dict[str, tuple[Any, Any]], made: dict[str, Any]) -> bool:
    if name not in before or name not in made:
        return True
    value, version = before[name]
    return made[name] is not value or version_of(value) != version or version is None


def interrupt_members(cls: type) -> dict[str, Any]:
    """Return the property `_interrupt` of a pipeline. An interrupt during a call takes effect at the next callback,
    where ranks exchange it: a rank that stopped alone would leave the others waiting."""
    if not hasattr(cls, "interrupt"):
        return {}

    def get(self: Any) -> bool:
        return self.__dict__.get("_interrupt", False)

    def put(self: Any, value: bool) -> None:
        has_callback = self.__dict__.get("_has_callback")
        if value and has_callback is False:
            raise UnsupportedError(
                "other ranks receive an interrupt at a callback only: pass callback_on_step_end (one that returns its "
                "arguments is enough) and set _interrupt in it, or at any time"
            )
        self.__dict__["_interrupt_requested" if value and has_callback else "_interrupt"] = value

    return {"_interrupt": property(get, put)}


def end_callbacks(pipe: Any) -> None:
    """Let interrupts take effect immediately again, after the call of a pipeline."""
    pipe.__dict__["_has_callback"] = None
