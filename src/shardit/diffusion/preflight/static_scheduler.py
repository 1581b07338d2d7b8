"""Checks names of schedulers and of their arguments against the source of diffusers, before torch is imported.

Some existing schedulers do not fit the model: those for models with and without flow matching are distinguished here.
Other checks are left to `diffusion/loading/schedulers.py`, which makes the scheduler.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from shardit.diffusion.loading.diffusers_source import (
    assigned,
    definitions,
    definitions_in,
    folder,
    is_exported,
    lineage,
    method,
    parameters_of,
)
from shardit.diffusion.loading.schedulers import (
    check_arguments,
    check_shift,
    shift_name,
    unfit_scheduler,
    unknown_scheduler,
)
from shardit.diffusion.loading.timesteps import TimestepArguments, arguments_in
from shardit.errors import InputError
from shardit.loading.missing_packages import is_missing, pip_line
from shardit.settings.model_options import ModelOptions

_USUAL = {
    *("self", "num_inference_steps", "device", "sigmas", "mu", "timesteps", "num_train_timesteps"),
    *("original_inference_steps", "strength"),
}
"""Arguments of `set_timesteps` that every scheduler may have, for any pipeline."""


def check_scheduler_names(options: ModelOptions, own: str, config: Mapping[str, Any], pipeline: str | None) -> None:
    """Raise InputError if the scheduler is not in diffusers, lacks a given argument, would ignore its shift, or is for
    other models.

    own, config: class and configuration of the model's own. pipeline: class of the pipeline.
    """
    name = options.scheduler or own
    node = definitions("schedulers").get(name)
    if node is None:
        if options.scheduler and definitions("schedulers") and not is_exported(name):
            raise unknown_scheduler(name, _proposed(own, config, _asked(pipeline)))
        return
    takes = parameters_of(node, "__init__")
    if not takes:
        return  # they are inherited
    check_arguments(name, takes, options.scheduler_args)
    if options.flow_shift is not None:
        shift_name(name, takes)
        if name == own:  # the arguments that another class takes from the configuration are known only when it is made
            made = _with_defaults(own, {**config, **options.scheduler_args})
            check_shift(name, made, _is_flow(own, made))
    if name != own and own in definitions("schedulers") and not _may_replace(name, own, config):
        raise unfit_scheduler(name, own, _proposed(own, config, _asked(pipeline)))


def check_scheduler_packages(options: ModelOptions, own: str) -> None:
    """Raise InputError, with the install command, if a package is missing without which diffusers does not make the
    scheduler, at all or with these arguments."""
    name = options.scheduler or own
    lacking = [package for package in _packages(name) if is_missing(package)]
    sigmas = sorted(key for key, value in options.scheduler_args.items() if value is True and key in _OF_SCIPY)
    if sigmas and is_missing("scipy"):
        name, lacking = f"{name} with {sigmas[0]}", ["scipy"]
    if lacking:
        text = f"{name} needs {', '.join(lacking)}, which is not installed: {pip_line(lacking)}"
        raise InputError(f"scheduler: {text}")


_OF_SCIPY = ("use_beta_sigmas",)


def _packages(name: str) -> list[str]:
    """Return the packages that a class of diffusers needs, from the stand-in that diffusers has without them."""
    utils = folder("utils")
    for file in [] if utils is None else sorted(utils.glob("dummy_*_objects.py")):
        if f"\nclass {name}(".encode() in file.read_bytes():
            node = next(one for one in definitions_in(file) if one.name == name)
            return [str(one.value) for one in getattr(assigned(node, "_backends"), "elts", [])]
    return []


def _may_replace(name: str, own: str, config: Mapping[str, Any]) -> bool:
    """Return whether a scheduler is for the same kind of models as the model's own, with respect to flow matching."""
    return _knows_flow(name) if _is_flow(own, config) else not _is_flow_class(name)


def _with_defaults(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item.default for key, item in _init(name).items()} | dict(config)


def _asked(pipeline: str | None) -> TimestepArguments:
    """Return the arguments that the pipeline passes to its scheduler."""
    nodes = [] if pipeline is None else lineage(pipeline)
    call = next(filter(None, (method(node, "__call__") for node in nodes)), None)
    return TimestepArguments() if call is None else arguments_in(ast.unparse(call))


def _proposed(own: str, config: Mapping[str, Any], asked: TimestepArguments) -> list[str]:
    """Return schedulers that can replace the model's own, as far as their source shows."""
    classes = definitions("schedulers")
    if own not in classes:
        return []
    flow = _is_flow(own, config)
    fit = [name for name in (classes if flow else _compatibles(classes[own])) if name in classes and is_exported(name)]
    fit = [name for name in fit if not flow or _knows_flow(name)]
    return sorted({own, *(name for name in fit if _takes(name, flow, asked))})


def _takes(name: str, flow: bool, asked: TimestepArguments) -> bool:
    """Return whether a scheduler has the methods that a pipeline calls, and `set_timesteps` takes its arguments."""
    node = definitions("schedulers")[name]
    takes = parameters_of(node, "set_timesteps")
    if not takes:
        return True  # it is inherited
    if any(method(node, each) is None for each in asked.methods):
        return False
    own_sigmas = asked.flow_sigmas and flow and "use_flow_sigmas" in _init(name)
    if asked.sigmas and not asked.array and not own_sigmas and not _is_flow_class(name):
        return False  # the flow-matching ones alone make arrays of lists
    needed = {"mu"} if asked.mu else set()
    needed |= {"sigmas"} if asked.sigmas and not own_sigmas else set()
    rest = any(item.kind is item.VAR_KEYWORD for item in takes.values())
    return needed <= takes.keys() and (rest or takes.keys() <= _USUAL)


def _init(name: str) -> Mapping[str, Any]:
    return parameters_of(definitions("schedulers")[name], "__init__")


def _knows_flow(name: str) -> bool:
    return _is_flow_class(name) or "use_flow_sigmas" in _init(name)


def _is_flow_class(name: str) -> bool:
    return name.startswith("FlowMatch") and name.endswith("Scheduler")


def _is_flow(name: str, config: Mapping[str, Any]) -> bool:
    values = _with_defaults(name, config)
    flow = values.get("prediction_type") == "flow_prediction" or values.get("use_flow_sigmas") is True
    return _is_flow_class(name) or flow


def _compatibles(node: ast.ClassDef) -> list[str]:
    """Return the names in `_compatibles` of a scheduler: all Karras schedulers, or a list."""
    value = assigned(node, "_compatibles")
    if isinstance(value, ast.ListComp):
        members = definitions("schedulers").get("KarrasDiffusionSchedulers")
        return [line.targets[0].id for line in ([] if members is None else members.body) if _is_member(line)]  # type: ignore[attr-defined]
    return [str(one.value) for one in getattr(value, "elts", []) if isinstance(one, ast.Constant)]


def _is_member(line: ast.stmt) -> bool:
    return isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name)
