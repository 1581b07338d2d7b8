"""Callbacks and interrupts between the steps of a pipeline, with the same outcome on every rank."""

from __future__ import annotations

from typing import Any

import torch

from shardit.core.comm.barrier import sendable
from shardit.core.comm.p2p import Comm
from shardit.core.components.owned import call_on
from shardit.core.runtime.pending import materialize
from shardit.core.runtime.randomness import generators_in, moved, set_states, states
from shardit.errors import InputError, UnsupportedError

CALLBACK, INPUTS = "callback_on_step_end", "callback_on_step_end_tensor_inputs"


def shared_callback(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any], ranks: Comm) -> dict[str, Any]:
    """The keyword arguments of a pipeline's call that begins, with a callback whose outcome is the same on all of
    `ranks`.

    Each rank runs its own. What rank 0's makes of the tensors and of random generators counts, an interrupt of any rank
    stops all at this step, and an error of any rank is raised on all.
    """
    callback = kwargs.get(CALLBACK)
    pipe.__dict__.update(_heard=callback is not None, _asked=False)
    if callback is None:
        return kwargs
    asked = {INPUTS: callback.tensor_inputs} if hasattr(callback, "tensor_inputs") else {}
    device, generators = ranks.group.device, generators_in((args, kwargs))

    def shared(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        materialize(given)
        before = {name: (value, _version(value)) for name, value in given.items()}
        drawn, made, error = states(device, generators), {}, None
        try:
            made = callback(pipe, step, timestep, given)
            if not isinstance(made, dict):
                raise InputError(f"{CALLBACK} must return a dict of tensors, as it is given one, not {made!r}")
        except Exception as failure:
            made, error = {}, sendable(failure)
        changed = [name for name in {**before, **made} if _changed(name, before, made)]
        interrupt = getattr(pipe, "_interrupt", False) or pipe.__dict__.get("_asked", False)
        after = states(device, generators)
        gathered = ranks.group.gather_objects((error, interrupt, changed, moved(drawn, after), list(made)))
        # What rank 0's callback drew counts: another's is taken back.
        set_states({name: drawn[name] for name in moved(drawn, after)} | gathered[0][3], device, generators)
        for failure, *_ in gathered:
            if failure is not None:
                raise failure
        if any(interrupt for _, interrupt, *_ in gathered):
            pipe.__dict__["_interrupt"] = True
        known, kept = {name for one in gathered for name in one[2]}, gathered[0][-1]
        news = call_on(ranks, 0, lambda: {name: made[name] for name in kept if name in known}) if known else {}
        return {name: news[name] if name in known else made[name] for name in kept}

    return {**kwargs, **asked, CALLBACK: shared}


def _changed(name: str, before: dict[str, tuple[Any, Any]], made: dict[str, Any]) -> bool:
    if name not in before or name not in made:
        return True
    value, version = before[name]
    return made[name] is not value or _version(value) != version or version is None


def _version(value: Any) -> int | None:
    """The version counter of a tensor; None if there is none."""
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else None


def interrupt_members(cls: type) -> dict[str, Any]:
    """`_interrupt` of a pipeline. What is set during a call counts from the next callback on, where ranks exchange it:
    a rank that stopped alone would leave the others waiting."""
    if not hasattr(cls, "interrupt"):
        return {}

    def get(self: Any) -> bool:
        return self.__dict__.get("_interrupt", False)

    def put(self: Any, value: bool) -> None:
        heard = self.__dict__.get("_heard")
        if value and heard is False:
            raise UnsupportedError(
                "an interrupt is heard by the other ranks at a callback only: pass callback_on_step_end (one that "
                "returns what it is given will do) and set _interrupt in it, or at any time"
            )
        self.__dict__["_asked" if value and heard else "_interrupt"] = value

    return {"_interrupt": property(get, put)}


def end_callbacks(pipe: Any) -> None:
    """After the call of a pipeline: interrupts count at once again."""
    pipe.__dict__["_heard"] = None
