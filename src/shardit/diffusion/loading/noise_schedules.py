"""Finds schedulers that can replace each other although diffusers does not list them as compatible, by trying."""

from __future__ import annotations

import inspect
from typing import Any

_STEPS = 4
_STEP = {"model_output", "timestep", "sample"}
"""Arguments that pipelines pass to `step` of any scheduler."""


def can_replace(cls: Any, own: Any) -> bool:
    """Return whether a scheduler of class `cls`, made from the configuration of a pipeline's `own`, denoises the same
    way.

    It must support the prediction type of the model, have the same share of noise at each time step, step from noise to
    image, and have a `step` that needs only arguments that every pipeline passes. This finds LCM and TCD, which
    recipes of distilled models use in place of DDIM, but not schedulers for inversion, for other noise or for one
    pipeline.
    """
    takes = inspect.signature(cls.__init__).parameters
    needed = {"prediction_type"}
    if str(own.config.get("variance_type", "")).startswith("learned"):
        needed.add("variance_type")  # the model outputs more than its prediction
    if not needed <= takes.keys() or not _required(cls) == _required(type(own)) == _STEP:
        return False
    try:
        made, mine = cls.from_config(own.config), type(own).from_config(own.config)
        return _same_noise(made, mine) and _decreases(made) and _decreases(mine)
    except Exception:  # it lacks a requirement in this configuration
        return False


def _required(cls: Any) -> set[str]:
    parameters = inspect.signature(cls.step).parameters.values() if hasattr(cls, "step") else ()
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {one.name for one in parameters if one.default is one.empty and one.kind not in kinds} - {"self"}


def _same_noise(one: Any, other: Any) -> bool:
    mine, theirs = (getattr(each, "alphas_cumprod", None) for each in (one, other))
    return mine is not None and theirs is not None and mine.shape == theirs.shape and bool((mine == theirs).all())


def _decreases(scheduler: Any) -> bool:
    scheduler.set_timesteps(_STEPS)
    return bool(scheduler.timesteps[0] > scheduler.timesteps[-1])
