"""Replaces the scheduler of a model, or its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from shardit.diffusion.loading.noise_schedules import can_replace
from shardit.diffusion.loading.timesteps import TimestepArguments, arguments_of, problem
from shardit.errors import InputError, did_you_mean, first_line
from shardit.settings.checks import is_number
from shardit.settings.model_options import ModelOptions

_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
"""Arguments with which a scheduler for several kinds of models serves flow-matching models."""


def wants_scheduler(options: ModelOptions) -> bool:
    """Return whether the options change the scheduler."""
    return bool(options.scheduler or options.scheduler_args or options.flow_shift is not None)


def changed_scheduler(own: Any, options: ModelOptions, pipeline_class: Any = None) -> Any:
    """Build the scheduler that the options request, from the configuration of the pipeline's `own`.

    It must accept the calls of pipelines of this class (None: unknown), as far as that can be tried. Between schedulers
    of flow-matching models, the shift is kept. Raises InputError for classes and arguments that do not fit.
    """
    if own is None:
        raise no_scheduler()
    asked = arguments_of(pipeline_class)
    cls = type(own) if options.scheduler is None else _class_of(options.scheduler, own, asked)
    arguments = {**_carried(own, cls), **options.scheduler_args}
    takes = inspect.signature(cls.__init__).parameters
    check_arguments(cls.__name__, takes, options.scheduler_args)
    if options.flow_shift is not None:
        arguments[shift_name(cls.__name__, takes)] = options.flow_shift
    try:
        made = cls.from_config(own.config, **arguments)
    except Exception as error:  # wrong values meet any line of its code
        first = first_line(error)
        raise InputError(f"scheduler: {cls.__name__} cannot be made with these arguments: {first}") from error
    if _is_flow(own) != _is_flow(made):
        what = "needs flow matching, which this is not" if _is_flow(own) else "knows no flow matching, which this is"
        raise InputError(f"scheduler: the model {what} ({cls.__name__} with these arguments); leave them out")
    if options.flow_shift is not None:
        check_shift(cls.__name__, made.config, _is_flow(made))
    if options.scheduler_args and (wrong := problem(made, asked)) and not problem(own, asked):
        given = ", ".join(f"{name}={value}" for name, value in options.scheduler_args.items())
        raise InputError(f"scheduler_args: {cls.__name__} cannot make steps with {given}: {wrong}")
    return made


def _class_of(name: str, own: Any, asked: TimestepArguments) -> Any:
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    found = getattr(diffusers, name, None)
    known = _names_for(own)
    if name == type(own).__name__ or (name in known and not _problem(found, own, asked)):
        return found
    known = [each for each in known if not _problem(getattr(diffusers, each, type(own)), own, asked)]
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise unknown_scheduler(name, known)
    raise unfit_scheduler(name, type(own).__name__, known)


def has_default(takes: Mapping[str, inspect.Parameter], name: str) -> bool:
    """Return whether a pipeline class, whose `__init__` has these parameters, can make a component itself."""
    return name in takes and takes[name].default is not inspect.Parameter.empty


def no_scheduler() -> InputError:
    """Return the error of a pipeline without a scheduler."""
    return InputError("scheduler: this pipeline has no scheduler; leave scheduler, scheduler_args, flow_shift out")


def unknown_scheduler(name: str, known: list[str]) -> InputError:
    """Return the error for a name that diffusers does not have; `known` are those that fit the model."""
    choice = f"; choose among {', '.join(known)}" if known else "; check the name"
    return InputError(f"scheduler: diffusers has no scheduler {name!r}{did_you_mean(name, known)}{choice}")


def unfit_scheduler(name: str, own: str, known: list[str]) -> InputError:
    """Return the error for a scheduler that cannot replace the pipeline's `own`; `known` are those that can."""
    why = f"{name} cannot take the place of {own} in this pipeline"
    return InputError(f"scheduler: {why}; choose among {', '.join(known)}")


def _problem(cls: Any, own: Any, asked: TimestepArguments) -> str:
    """Return why a scheduler of another class would fail although the pipeline's own does not; "" if nothing is
    known."""
    with _silent():
        if cls is type(own) or problem(own, asked):
            return ""
        try:
            made = cls.from_config(own.config, **_carried(own, cls))
        except Exception:  # it depends on further arguments; the error comes with those
            return ""
        return problem(made, asked)


@contextmanager
def _silent() -> Iterator[None]:
    """Silence diffusers' warnings about schedulers that are only tried."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _names_for(own: Any) -> list[str]:
    """Return schedulers that can replace a pipeline's own: for flow-matching models all that support these, for others
    those that diffusers lists as compatible, and those with the same noise schedule."""
    import diffusers

    found = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")}
    classes = {name: cls for name, cls in found.items() if isinstance(cls, type)}
    if not _is_flow(own):
        names = {cls.__name__ for cls in own.compatibles if not _is_flow_class(cls)}
        with _silent():
            others = {name for name, cls in classes.items() if not _is_flow_class(cls) and can_replace(cls, own)}
        return sorted({type(own).__name__, *names, *others})
    usable = {name for name, cls in classes.items() if _knows_flow(cls)}
    return sorted({type(own).__name__, *usable})


def _knows_flow(cls: Any) -> bool:
    return _is_flow_class(cls) or "use_flow_sigmas" in inspect.signature(cls.__init__).parameters


def _is_flow_class(cls: Any) -> bool:
    return cls.__name__.startswith("FlowMatch")


def _is_flow(scheduler: Any) -> bool:
    config = scheduler.config
    return _is_flow_class(type(scheduler)) or bool(
        config.get("use_flow_sigmas") or config.get("prediction_type") == _FLOW["prediction_type"]
    )


def _carried(own: Any, cls: Any) -> dict[str, Any]:
    """Return arguments for another class of flow-matching scheduler, in addition to the common configuration."""
    if cls is type(own) or not _is_flow(own):
        return {}
    takes = inspect.signature(cls.__init__).parameters
    carried = {name: value for name, value in _FLOW.items() if name in takes and not _is_flow_class(cls)}
    shift = own.config.get("flow_shift", own.config.get("shift"))
    name = next((name for name in ("flow_shift", "shift") if name in takes), None)
    return {**carried, **({name: shift} if name and shift is not None else {})}


def check_arguments(class_name: str, parameters: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> None:
    """Raise InputError for arguments that a scheduler's `__init__`, which has these parameters, does not take."""
    known = [name for name, one in parameters.items() if name != "self" and one.kind is not one.VAR_KEYWORD]
    for name, value in given.items():
        if name not in known:
            raise InputError(
                f"scheduler_args: {class_name} takes no {name!r}{did_you_mean(name, known)}; it takes: "
                f"{', '.join(known)}"
            )
        default = parameters[name].default
        if isinstance(default, bool) and not isinstance(value, bool):
            raise InputError(f"scheduler_args: {name} must be true or false, got {value!r}")
        if is_number(default) and value is not None and not is_number(value):
            raise InputError(f"scheduler_args: {name} must be a number, got {value!r}")
        if isinstance(default, str) and value is not None and not isinstance(value, str):
            raise InputError(f"scheduler_args: {name} must be a text, got {value!r}")


def shift_name(class_name: str, takes: Collection[str]) -> str:
    """Return the argument of a scheduler that is its shift, among those that it takes. Raises InputError if it has
    none."""
    name = next((name for name in ("flow_shift", "shift") if name in takes), None)
    if name is None:
        raise InputError(f"flow_shift: {class_name} has no shift; leave it out")
    return name


def check_shift(class_name: str, config: Mapping[str, Any], flow: bool) -> None:
    """Raise InputError if a scheduler with this configuration would ignore its shift. flow: whether it is for
    flow-matching models."""
    if config.get("use_dynamic_shifting"):
        raise InputError(
            f"flow_shift: this {class_name} shifts by the size of the image; add use_dynamic_shifting=false to "
            "scheduler_args, or leave flow_shift out"
        )
    if not flow:
        raise InputError(f"flow_shift: this {class_name} does not match flows, so it has no effect; leave it out")
