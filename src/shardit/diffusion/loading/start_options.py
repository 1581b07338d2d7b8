"""Applies options to a loaded pipeline: adapters, fused projections, and tiling or slicing of its VAEs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shardit.diffusion.class_homes import VAE_PACKAGE
from shardit.errors import InputError, UnsupportedError, first_line
from shardit.loading.hub import unreachable
from shardit.loading.index import ADAPTER_CONFIG, base_model, read_adapter
from shardit.loading.missing_packages import is_missing
from shardit.loading.quiet import quiet
from shardit.loading.safetensors_file import Header
from shardit.settings.lora import INTO_SECOND, SECOND, Lora
from shardit.settings.model_options import ModelOptions


def check_extras(cls: Any, modules: Mapping[str, Any], options: ModelOptions) -> None:
    """Raise InputError if a pipeline of class `cls` with these modules does not support the options."""
    if options.lora:
        _check_lora(cls, options.lora)
    for name, method in (("vae_tiling", "enable_tiling"), ("vae_slicing", "enable_slicing")):
        if getattr(options, name):
            _vaes(cls, modules, name, method)
    if options.fuse_projections:
        from shardit.diffusion.roles import denoises

        _fusable(cls, {name: one for name, one in modules.items() if denoises(name, one)})


def use_vae_options(pipe: Any, options: ModelOptions) -> None:
    """Enable tiling or slicing of a pipeline's VAEs. Raises InputError if none of them supports it."""
    for name, method in (("vae_tiling", "enable_tiling"), ("vae_slicing", "enable_slicing")):
        if getattr(options, name):
            for vae in _vaes(type(pipe), pipe.components, name, method):
                getattr(vae, method)()


def fuse_projections(pipe: Any, names: Iterable[str]) -> None:
    """Fuse the projections of queries, keys and values in those of a pipeline's components that can. Raises InputError
    if none can."""
    for name, model in _fusable(type(pipe), {name: getattr(pipe, name) for name in names}).items():
        try:
            model.fuse_qkv_projections()
        except ValueError as error:
            raise InputError(f"fuse_projections: {name}: {first_line(error)}; leave it out") from error


def _fusable(cls: Any, models: Mapping[str, Any]) -> dict[str, Any]:
    able = {name: one for name, one in models.items() if hasattr(one, "fuse_qkv_projections") and _has_fusable(one)}
    if not able:
        from shardit.core.modules.patching import plain_class

        kinds = " and ".join(sorted(plain_class(one).__name__ for one in models.values()))
        raise InputError(f"fuse_projections: {kinds} of {cls.__name__} cannot fuse its projections; leave it out")
    return able


def _has_fusable(model: Any) -> bool:
    """Return whether `fuse_qkv_projections` of a model of diffusers changes anything."""
    from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    from shardit.core.modules.patching import plain_class

    of_mixin = plain_class(model).fuse_qkv_projections is AttentionMixin.fuse_qkv_projections
    kind = AttentionModuleMixin if of_mixin else (AttentionModuleMixin, Attention)
    return any(isinstance(part, kind) and getattr(part, "_supports_qkv_fusion", True) for part in model.modules())


def load_loras(pipe: Any, loras: tuple[Lora, ...]) -> None:
    """Load adapters into a pipeline, which may be sharded over ranks, and set their scales. Raises InputError."""
    if not loras:
        return
    _check_lora(type(pipe), loras)
    names = [f"lora_{number}" for number in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        try:
            logging.getLogger("diffusers.loaders.peft").addFilter(_no_error)  # the error is one line
            with quiet():
                for path, arguments in _parts(lora, pipe):
                    pipe.load_lora_weights(path, adapter_name=name, use_safetensors=True, **arguments)
        except Exception as error:
            raise _not_loaded(lora, pipe, error) from error
        finally:
            logging.getLogger("diffusers.loaders.peft").removeFilter(_no_error)
        held = {one for adapters in pipe.get_list_adapters().values() for one in adapters}
        if name not in held:  # diffusers only warns of a file without any key of this pipeline
            raise InputError(f"lora {lora.path} holds nothing for {type(pipe).__name__}: it is for another model")
    pipe.set_adapters(names, [lora.scale for lora in loras])
    for part in pipe.components.values():
        if getattr(part, "peft_config", None):
            part.eval()  # a file may ask for dropout, which its trainer used


def _no_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


def _parts(lora: Lora, pipe: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return paths and arguments of `load_lora_weights` for an adapter. What is in a folder with the name of the second
    expert, or in such a folder inside of the adapter's, as `shardit train` writes it, is for that expert."""
    path, second = Path(lora.path), {**lora.arguments, INTO_SECOND: True}
    if INTO_SECOND in lora.arguments:
        found = [(lora.path, dict(lora.arguments))]
    elif SECOND in (path.name, path.parent.name if path.suffix else ""):
        found = [(lora.path, second)]
    else:
        found = [(lora.path, dict(lora.arguments))]
        if any((path / SECOND).glob("*.safetensors")):
            found.append((str(path / SECOND), second))
    if any(arguments.get(INTO_SECOND) for _, arguments in found) and getattr(pipe, SECOND, None) is None:
        raise InputError(f"lora {lora.path} has weights for {SECOND}, which this {type(pipe).__name__} does not have")
    return found


def _not_loaded(lora: Lora, pipe: Any, error: Exception) -> Exception:
    """Return the exception to raise if an adapter could not be loaded: `error` itself, if the user cannot correct
    it."""
    from safetensors import SafetensorError

    if found := unreachable(error, f"lora {lora.path}", "a local file"):
        return found
    if isinstance(error, UnsupportedError):
        return UnsupportedError(f"lora {lora.path}: {error}")
    if isinstance(error, InputError) or not isinstance(error, (*_OF_FILES, SafetensorError)):
        return error
    return InputError(f"lora {lora.path} cannot be loaded into {type(pipe).__name__}: {first_line(error)}")


def _check_lora(cls: Any, loras: tuple[Lora, ...]) -> None:
    check_lora_support(cls.__name__, hasattr(cls, "load_lora_weights"))
    source = inspect.signature(cls.lora_state_dict).parameters if hasattr(cls, "lora_state_dict") else {}
    known = [*inspect.signature(cls.load_lora_weights).parameters, *source, *_HUB]
    for lora in loras:
        refuse_language_adapter(lora)
        for name in lora.arguments:
            if name not in known:
                raise InputError(f"lora {lora.path}: {cls.__name__}.load_lora_weights takes no {name!r}; leave it out")


def check_lora_support(class_name: str, takes_lora: bool) -> None:
    """Raise InputError if a pipeline class takes no adapters, or the package that loads them is missing."""
    if not takes_lora:
        raise InputError(f"lora: {class_name} takes no LoRA; leave it out")
    if is_missing("peft"):
        raise InputError("lora needs peft: pip install peft")


def refuse_language_adapter(lora: Lora) -> None:
    """Raise InputError for an adapter of a language model, which peft's configuration of it states."""
    if read_adapter(_inside(lora)).get("task_type") == "CAUSAL_LM":
        raise InputError(
            f"lora {lora.path} is an adapter of a language model (task_type CAUSAL_LM in {ADAPTER_CONFIG}): give it to "
            f"shardit complete, chat or serve with the model that it was trained on{base_model(_inside(lora))}"
        )


def _inside(lora: Lora) -> Path:
    """Return the folder of an adapter that is on this disk."""
    path = Path(lora.path)
    return path.parent if path.is_file() else path / str(lora.arguments.get("subfolder") or "")


def check_lora_file(lora: Lora) -> None:
    """Raise InputError if the local file of an adapter is damaged. Among several in a folder diffusers chooses one."""
    refuse_language_adapter(lora)
    inside = _inside(lora)
    name = lora.arguments.get("weight_name")
    files = [inside / str(name)] if name else list(inside.glob("*.safetensors"))
    file = Path(lora.path) if Path(lora.path).is_file() else files[0] if len(files) == 1 else None
    if file is not None:
        try:
            Header.read(file)
        except InputError as error:
            raise InputError(f"lora {error}") from error


_OF_FILES = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError)
"""Exceptions of diffusers and peft for files that do not fit."""
_HUB = ("weight_name", "subfolder", "revision", "token", "local_files_only", INTO_SECOND)
"""Arguments that `load_lora_weights` of all pipelines takes by **kwargs; the last for those with two transformers."""


def _vaes(cls: Any, modules: Mapping[str, Any], option: str, method: str) -> list[Any]:
    flag = "use_" + method.removeprefix("enable_")
    from diffusers.models.modeling_utils import ModelMixin

    vaes = {name: one for name, one in modules.items() if isinstance(one, ModelMixin) and _is_vae(one)}
    able = [vae for vae in vaes.values() if hasattr(vae, method) and hasattr(vae, flag)]
    if not able:
        kinds = " and ".join(sorted(type(vae).__name__ for vae in vaes.values()))
        parts = {"vae_tiling": "tiles", "vae_slicing": "slices"}[option]
        why = f"{kinds} of {cls.__name__} cannot work in {parts}" if kinds else f"{cls.__name__} has no VAE"
        raise InputError(f"{option}: {why}; leave it out")
    return able


def _is_vae(module: Any) -> bool:
    return type(module).__module__.startswith(VAE_PACKAGE) or hasattr(module, "decode")
