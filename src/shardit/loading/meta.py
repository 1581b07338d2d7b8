"""Builds a module without memory for its parameters."""

from __future__ import annotations

import functools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardit.errors import InputError, UnsupportedError, first_line
from shardit.loading.model_lists import class_in, folders_of, is_several

if TYPE_CHECKING:
    import torch
    from torch import nn

# The switches below are global to the process.
_ONE_AT_A_TIME = threading.RLock()


def build(
    cls: type,
    config_folder: str | os.PathLike,
    dtype: torch.dtype | None = None,
    stored_dtype: Callable[[], torch.dtype | None] | None = None,
) -> nn.Module:
    """Build a module of a diffusers ModelMixin or transformers PreTrainedModel class with every parameter on meta.

    Buffers and other tensors made in `__init__` are computed for real, under `dtype` as from_pretrained would.
    dtype: None means the class's default: float32 for diffusers, the config's own for transformers. stored_dtype:
    returns the dtype of the weights; called if the config has no dtype.
    Raises InputError for a missing or unreadable config, UnsupportedError for other classes.
    """
    from diffusers.models.modeling_utils import ModelMixin
    from transformers import PreTrainedModel

    if not (Path(config_folder) / "config.json").is_file():
        raise InputError(f"{config_folder} has no config.json for its {cls.__name__}: download or copy the model again")
    if issubclass(cls, ModelMixin) and is_several(cls):
        return _build_several(cls, Path(config_folder), dtype)
    if issubclass(cls, ModelMixin):
        return _build_diffusers(cls, config_folder, dtype)
    if issubclass(cls, PreTrainedModel):
        return _build_transformers(cls, config_folder, dtype, stored_dtype)
    raise UnsupportedError(f"{cls.__name__} is neither a diffusers nor a transformers model: it cannot be loaded here")


def _build_several(cls: Any, folder: Path, dtype: torch.dtype | None) -> nn.Module:
    parts = []
    for one in folders_of(folder):
        parts.append(_build_diffusers(class_in(one), one, dtype))
        parts[-1].register_to_config(_name_or_path=str(one))
    return cls(parts).eval()


def _build_diffusers(cls: Any, folder: str | os.PathLike, dtype: torch.dtype | None) -> Any:
    with _one_line(folder):
        config = cls.load_config(str(folder))
    if not isinstance(config, dict):
        raise InputError(f"config.json in {folder} is no JSON object: download or copy the model again")
    if config.get("quantization_config"):
        raise UnsupportedError(f"{folder} holds quantized weights: use a folder with plain weights")
    with _one_line(folder), _default_dtype(dtype), parameters_on_meta():
        return cls.from_config(config).eval()


def _build_transformers(
    cls: Any,
    folder: str | os.PathLike,
    dtype: torch.dtype | None,
    stored_dtype: Callable[[], torch.dtype | None] | None,
) -> nn.Module:
    import torch

    with _one_line(folder):
        config = cls.config_class.from_pretrained(str(folder))
    if getattr(config, "quantization_config", None):
        raise UnsupportedError(f"{folder} holds quantized weights: use a folder with plain weights")
    chosen = dtype or _own_dtype(config) or (stored_dtype and stored_dtype()) or torch.float32
    return build_transformers(cls, config, chosen, folder)


def build_transformers(cls: Any, config: Any, dtype: torch.dtype, where: str | os.PathLike) -> nn.Module:
    """Build a module of a PreTrainedModel class from its configuration, with every parameter on meta. where: its folder
    or file, for errors. Raises InputError."""
    config.name_or_path = str(where)
    with _one_line(where), parameters_on_meta(), _no_values_for_meta():
        module = cls._from_config(config, dtype=dtype)
    _keep_some_in_float32(module, dtype)
    return module.eval()


def _own_dtype(config: Any) -> torch.dtype | None:
    import torch

    own = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return getattr(torch, own) if isinstance(own, str) else own


def _keep_some_in_float32(module: Any, dtype: torch.dtype) -> None:
    """transformers keeps some modules in float32: the strict list always, the other one for float16 only."""
    import torch

    keep = list(getattr(module, "_keep_in_fp32_modules_strict", None) or []) if dtype.itemsize == 2 else []
    if dtype == torch.float16:
        keep += list(getattr(module, "_keep_in_fp32_modules", None) or [])
    if not keep:
        return
    pattern = re.compile(rf"(?:^|\.)(?:{'|'.join(keep)})(?:\.|$)")
    for name, parameter in module.named_parameters():
        if pattern.search(name):
            parameter.data = parameter.data.float()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Move each parameter to meta as soon as a module registers it, and disable initialisation.

    A parameter that already is on meta stays the same object, so that tied weights stay tied.
    """
    from torch import nn

    inits = {name: init for name, init in vars(nn.init).items() if name.endswith("_") and not name.startswith("_")}
    with _ONE_AT_A_TIME:
        register = nn.Module.register_parameter

        def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
            register(self, name, param)
            if param is not None and not param.is_meta:
                self._parameters[name] = nn.Parameter(param.data.to("meta"), requires_grad=param.requires_grad)

        nn.Module.register_parameter = register_on_meta  # pyright: ignore[reportAttributeAccessIssue]
        for name in inits:
            setattr(nn.init, name, _leave_as_is)
        try:
            yield
        finally:
            nn.Module.register_parameter = register
            for name, init in inits.items():
                setattr(nn.init, name, init)


@contextmanager
def _no_values_for_meta() -> Iterator[None]:
    """Prevent transformers from initializing tensors on meta: torch runs these initializers in Python, which takes as
    long as the rest of a build. transformers 5 has its own copies of functions of `torch.nn.init`."""
    kept: dict[str, Callable[..., Any]]
    kept = getattr(sys.modules.get("transformers.initialization"), "TORCH_INIT_FUNCTIONS", {})
    before = dict(kept)
    with _ONE_AT_A_TIME:
        kept.update({name: functools.partial(_unless_on_meta, init) for name, init in before.items()})
        try:
            yield
        finally:
            kept.update(before)


def _unless_on_meta(init: Callable[..., Any], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return tensor if tensor.is_meta else init(tensor, *args, **kwargs)


def _leave_as_is(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return tensor


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    import torch

    with _ONE_AT_A_TIME:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype or before)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextmanager
def _one_line(folder: str | os.PathLike) -> Iterator[None]:
    """Convert errors in a config to one line."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # models check their configurations by any kind, such as transformers' own validation
        raise InputError(f"cannot build the model of {folder} from its configuration: {first_line(error)}") from error
