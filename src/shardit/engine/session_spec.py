"""The arguments of `Omni`, checked, become what every rank starts from."""

from __future__ import annotations

import os
from typing import Any

from shardit.config import DiffusionParallelConfig
from shardit.diffusion.loading.model_options import ModelOptions
from shardit.engine.process.messages import SESSION, SessionSpec
from shardit.errors import InputError
from shardit.loading.dtypes import setting
from shardit.loading.source import local_folder

MAX_TIMEOUT_S = 1_000_000
"""Eleven days; poll() counts milliseconds in 31 bits."""


def session_spec(
    model: Any,
    config: DiffusionParallelConfig,
    dtype: Any,
    device: Any,
    max_in_flight: Any,
    timeout_s: Any,
    attention_backend: Any,
    options: ModelOptions,
    session: str,
) -> SessionSpec:
    """Check the types of all arguments; what they mean is checked where the model is read."""
    if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
        raise InputError(f'model must be a hub id, a folder or "tiny/NAME", got {model!r}')
    if session == SESSION:  # another one decides itself what a model is
        local_folder(model)
    # torch's own type by name: this process need not import torch.
    known = isinstance(device, str) or (type(device).__module__, type(device).__name__) == ("torch", "device")
    if device is not None and not (known and str(device)):
        raise InputError(f"device must be a name, a torch.device or None, got {device!r}")
    if not isinstance(max_in_flight, int) or isinstance(max_in_flight, bool) or max_in_flight < 1:
        raise InputError(f"max_in_flight must be a whole number of at least 1, got {max_in_flight!r}")
    number = isinstance(timeout_s, (int, float)) and not isinstance(timeout_s, bool)
    if not (number and 0 < timeout_s <= MAX_TIMEOUT_S):
        raise InputError(
            f"timeout_s must be a number of seconds, above 0 and at most {MAX_TIMEOUT_S}, got {timeout_s!r}"
        )
    if attention_backend is not None and not isinstance(attention_backend, str):
        raise InputError(f"attention_backend must be a name or None, got {attention_backend!r}")
    return SessionSpec(
        model=os.fspath(model) if isinstance(model, os.PathLike) else model,
        config=config,
        dtype=setting(dtype),
        device=None if device is None else str(device),
        max_in_flight=max_in_flight,
        timeout_s=float(timeout_s),
        session=session,
        attention_backend=attention_backend,
        options=options,
    )
