"""The optimizers of a run, by name, over the parameters that this rank owns."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shardit.config import reject_unknown_names
from shardit.errors import InputError, first_line
from shardit.settings.checks import is_number
from shardit.training.settings import TrainSettings

_CLASSES = {
    "adamw": ("torch.optim", "AdamW"),
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "sgd": ("torch.optim", "SGD"),
    "prodigy": ("prodigyopt", "Prodigy"),
    "adafactor": ("torch.optim", "Adafactor"),
}
"""Module and class of each optimizer. All but Prodigy treat each tensor alone (Adafactor's clipping, too), so that
stages with a part of the parameters do as one rank does."""

_SETTINGS = {"lr": "learning_rate", "weight_decay": "weight_decay", "params": "lora_targets"}
"""Arguments that are settings of their own."""


def make_optimizer(settings: TrainSettings, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer | None:
    """Return the optimizer of some parameters; None if there are none, as on a stage with nothing to train.

    Raises InputError for arguments that it does not take.
    """
    module, name = _CLASSES[settings.optimizer]
    cls = getattr(importlib.import_module(module), name)
    given = dict(settings.optimizer_args)
    for argument, setting in _SETTINGS.items():
        if argument in given:
            raise InputError(f"optimizer_args: {argument} is a setting of its own: give {setting}")
    known = inspect.signature(cls).parameters
    takes = [one for one in known if one not in ("self", "params", "lr", "weight_decay")]
    reject_unknown_names(f"optimizer_args: {name}", given, takes)
    for key, value in given.items():
        _check_kind(key, value, known[key])
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    try:
        # Also if there is nothing to train: all ranks find the same mistakes.
        some = list(parameters.values()) or [nn.Parameter(torch.zeros(1))]
        made = cls(some, lr=settings.learning_rate, weight_decay=settings.weight_decay, **given)
    except (ValueError, TypeError) as error:
        raise InputError(f"optimizer_args: {name} refuses them: {first_line(error)}") from error
    return made if parameters else None


def _check_kind(name: str, value: Any, takes: inspect.Parameter) -> None:
    """Raise InputError for a value of another kind than the default: the classes take any, and fail later or never."""
    default = takes.default
    if isinstance(default, bool) or "bool" in str(takes.annotation):
        if not isinstance(value, bool):
            raise InputError(f"optimizer_args: {name} must be true or false, got {value!r:.100}")
    elif isinstance(default, (int, float)):
        if not is_number(value):
            raise InputError(f"optimizer_args: {name} must be a number, such as {default}, got {value!r:.100}")
    elif isinstance(default, tuple):
        parts = value if isinstance(value, (list, tuple)) else ()
        if len(parts) != len(default) or not all(map(is_number, parts)):
            raise InputError(f"optimizer_args: {name} must be a list of {len(default)} numbers, got {value!r:.100}")


def try_optimizer(settings: TrainSettings, device: torch.device) -> None:
    """Make one step of the optimizer with a number, before any data is read. Raises InputError if it fails."""
    number = nn.Parameter(torch.ones(1, device=device))
    number.grad = torch.ones_like(number)
    try:
        optimizer = make_optimizer(settings, {"number": number})
        assert optimizer is not None
        optimizer.step()
    except InputError:
        raise
    except Exception as error:  # each class fails in its own way
        what = "optimizer_args" if settings.optimizer_args else "optimizer"
        raise InputError(f"{what}: {settings.optimizer} makes no step with them ({first_line(error)})") from error


def state_of(optimizer: torch.optim.Optimizer | None, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """Return the state of some parameters by name."""
    return {} if optimizer is None else {n: optimizer.state[p] for n, p in parameters.items() if p in optimizer.state}


def set_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: Mapping[str, Any]) -> None:
    """Set the state of a parameter that `state_of` gave, bit for bit: `load_state_dict` would change types."""
    on_host = not any(group.get("capturable") or group.get("fused") for group in optimizer.param_groups)

    def placed(key: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.clone() if key == "step" and on_host else value.to(parameter.device, copy=True)

    optimizer.state[parameter] = {key: placed(key, value) for key, value in state.items()}


def found_by(optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Return the numbers that an optimizer has found for all parameters together, such as Prodigy's step size."""
    if optimizer is None:
        return {}
    return {key: value for key, value in optimizer.param_groups[0].items() if key not in _given(optimizer)}


def set_found(optimizer: torch.optim.Optimizer, found: Mapping[str, Any]) -> None:
    """Set the numbers that `found_by` gave."""
    optimizer.param_groups[0].update({key: value for key, value in found.items() if key not in _given(optimizer)})


def _given(optimizer: torch.optim.Optimizer) -> set[str]:
    """Return the names in a group that are arguments of the optimizer."""
    return {"params", *optimizer.defaults.keys() & inspect.signature(type(optimizer)).parameters.keys()}
