"""Checks the arguments of `Omni` or `LLM` and builds the settings with which every rank starts."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from shardit.config import DiffusionParallelConfig, device_kind
from shardit.engine.process.gpu_driver import has_gpu_driver
from shardit.engine.process.messages import SESSION, SessionSpec
from shardit.errors import InputError
from shardit.loading.dtypes import setting
from shardit.loading.source import local_folder
from shardit.settings.declare import check_declared, declared
from shardit.settings.environment import check_environment
from shardit.settings.model_options import ModelOptions

LAUNCH_NAMES = tuple(item.name for item in declared(SessionSpec))
"""The settings of `SessionSpec` that a user can give."""


def session_spec(
    model: Any, config: DiffusionParallelConfig, options: ModelOptions, session: str, **launch: Any
) -> SessionSpec:
    """Check the types of all arguments; their values are checked when the model is read. `launch`: the given settings
    of `LAUNCH_NAMES`, and the task if it is not that of pipelines."""
    check_environment()
    if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
        raise InputError(f'model must be a hub id, a folder or "tiny/NAME", got {model!r}')
    if session == SESSION and "task" not in launch:  # other sessions decide what a model is
        local_folder(model)
    device = launch.get("device")
    # By the name of torch's own type: this process need not import torch.
    known = isinstance(device, str) or (type(device).__module__, type(device).__name__) == ("torch", "device")
    if device is not None and not (known and str(device)):
        raise InputError(f"device must be a name, a torch.device or None, got {device!r}")
    if device is not None and device_kind(str(device)) == "cuda" and not has_gpu_driver():
        raise InputError(f"device {str(device)!r}: this machine has no driver of a GPU; leave device out, or use cpu")
    spec = SessionSpec(os.fspath(model), config, session=session, options=options, **launch)
    check_declared(spec)
    return dataclasses.replace(
        spec,
        dtype=setting(spec.dtype),
        device=None if device is None else str(device),
        timeout_s=float(spec.timeout_s),
    )
