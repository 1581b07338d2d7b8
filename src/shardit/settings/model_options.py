"""Options for loading a model besides its name and the parallel degrees: plain data, checked without torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardit.errors import InputError, did_you_mean
from shardit.settings.checks import FLAG, NAME, NAMED_VALUES, number
from shardit.settings.declare import Flag, check_declared, declare
from shardit.settings.lora import Lora, loras
from shardit.settings.paths import user_path

SHIFT = number(above=0)
"""The check of a shift: at 0 all noise levels are equal, or not numbers."""


@dataclass(frozen=True)
class ModelOptions:
    """Options of `Omni`, `load` and the command line for a model; each field is off by default."""

    single_files: Mapping[str, str] = declare(
        dict,
        "File in a format that from_single_file reads, in place of a component.",
        flag=Flag("single_file", metavar="<component=path>", example="transformer=flux.safetensors"),
    )
    """Paths by the component that they replace, {"transformer": path}; "*": by all components in the file."""
    variant: str | None = declare(None, "Variant of the weight files, such as fp16, as in diffusers.", NAME)
    scheduler: str | None = declare(
        None, "Scheduler of diffusers by its class name. [default: the model's]", NAME, flag=Flag(metavar="<class>")
    )
    flow_shift: float | None = declare(None, "Shift of a flow-matching scheduler. [default: the model's]", SHIFT)
    scheduler_args: Mapping[str, Any] = declare(
        dict,
        "Argument of the scheduler, as in use_karras_sigmas=true.",
        NAMED_VALUES,
        flag=Flag("scheduler_arg", metavar="<name=value>", example="use_karras_sigmas=true"),
    )
    """Arguments of the scheduler's `__init__` that replace those of its configuration, by name."""
    lora: tuple[Lora, ...] = declare(
        (),
        "LoRA to load at start: a file, folder or hub id.",
        flag=Flag(kind=list[str] | None, metavar="<path[:scale]>"),
    )
    """Adapters that stay active: a path or hub id (with ":SCALE" at its end, if need be), (path, scale),
    {"path": ..., "scale": ...}, or a list of these. "transformer_2=PATH" is for the second expert of Wan 2.2."""
    vae_tiling: bool = declare(False, "Let the VAE work tile by tile, with less memory.", FLAG)
    vae_slicing: bool = declare(False, "Let the VAE work image by image, with less memory.", FLAG)
    fuse_projections: bool = declare(
        False, "Compute queries, keys and values in one product, as fuse_qkv_projections() of diffusers does.", FLAG
    )
    """It takes memory for a copy of these weights, and may change last bits."""


WHOLE = "*"
"""The key in `single_files` for a file with all components in it."""

NO_OPTIONS = ModelOptions()
OPTION_NAMES = tuple(item.name for item in dataclasses.fields(ModelOptions))


def model_options(**given: Any) -> ModelOptions:
    """Return the options of the given fields, checked as far as possible without the model. None means not given.

    lora: one adapter or a list of them, each a path (optionally with ":SCALE" at its end), a pair (path, scale), or a
    dict with "path", "scale" and further arguments of `load_lora_weights`. Raises InputError.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    arguments = chosen.get("scheduler_args", {})
    for name in ("flow_shift", "shift") if isinstance(arguments, Mapping) else ():
        if arguments.get(name) is not None:
            SHIFT(f"scheduler_args: {name}", arguments[name])
        if "flow_shift" in chosen and name in arguments and arguments[name] != chosen["flow_shift"]:
            raise InputError(
                f"the shift is given twice, as flow_shift {chosen['flow_shift']} and in scheduler_args as {name} "
                f"{arguments[name]}; give one of them"
            )
    if chosen.get("fuse_projections") is True and chosen.get("lora"):
        raise InputError("fuse_projections would leave out the weights of lora; give one of them")
    chosen["single_files"] = _single_files(chosen.get("single_files", {}))
    chosen["lora"] = loras(chosen.get("lora", ()))
    check_declared(options := ModelOptions(**chosen))
    return dataclasses.replace(options, scheduler_args=dict(options.scheduler_args))


def take_options(keywords: dict[str, Any]) -> ModelOptions:
    """Remove the options from keywords and return them. Raises InputError."""
    return model_options(**{name: keywords.pop(name) for name in OPTION_NAMES if name in keywords})


def split_model(model: Any, model_config: Any, options: ModelOptions) -> tuple[Any, ModelOptions]:
    """Return the folder or hub id of the configuration if `model` is a single file, and the options with that file.

    Raises InputError if one is given without the other.
    """
    is_name = isinstance(model, (str, os.PathLike)) and os.fspath(model) != ""
    file = user_path("model", model) if is_name else Path()
    single = is_name and (file.is_file() or (file.suffix in _WEIGHTS and not file.is_dir()))
    if not single:
        if model_config is not None:
            raise InputError(
                "model_config (--config) is for a model that is one file; leave it out, or give the file as model"
            )
        return model, options
    files = _single_files({WHOLE: model})
    if model_config is None:
        raise InputError(
            f"{os.fspath(model)} is a single file: give a diffusers folder or hub id with its configuration, too "
            "(model_config=, --config on the command line)"
        )
    if options.single_files.get(WHOLE, files[WHOLE]) != files[WHOLE]:
        raise InputError(
            f"the file of the model is given twice, as model {os.fspath(model)} and in single_files as "
            f"{options.single_files[WHOLE]}; give one of them"
        )
    return model_config, dataclasses.replace(options, single_files={**files, **options.single_files})


def _single_files(given: Any) -> dict[str, str]:
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise InputError(f"single_files must be a dict with components as keys, got {given!r}")
    found = {}
    for name, value in given.items():
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
            raise InputError(f"single_files: {name} must be the path of a file, got {value!r}")
        path = user_path(f"single_files: {name}", value)
        if not path.is_file():
            raise InputError(f"single file {path} does not exist: correct the path")
        if path.suffix == ".gguf":
            raise InputError(f"single file {path} is quantized, which is not supported: give a .safetensors file")
        if path.suffix == ".json":
            raise InputError(f"single file {path} holds no weights: give a .safetensors file, or the folder as model")
        if path.suffix != ".safetensors":
            raise InputError(f"single file {path} is no .safetensors file: pickles can run code, convert it first")
        found[name] = str(path.resolve())
    return found


def check_single_files(options: ModelOptions, class_name: str, known: Collection[str]) -> None:
    """Raise InputError if a file is given for a component that is not a model of the pipeline class."""
    if unknown := sorted(options.single_files.keys() - {WHOLE, *known}):
        near = did_you_mean(unknown[0], known)
        raise InputError(f"single_files: {class_name} has no model {unknown[0]!r}{near}; it has {', '.join(known)}")


_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


def described(options: ModelOptions) -> str:
    """Return the options that are set, in one line; empty if none is."""
    chosen = given_options(options)
    if options.lora:
        chosen["lora"] = [f"{lora.path}:{lora.scale:g}" for lora in options.lora]
    return ", ".join(f"{name}={value}" for name, value in chosen.items())


def given_options(options: ModelOptions) -> dict[str, Any]:
    """Return the options that are set, by name."""
    items = ((name, getattr(options, name)) for name in OPTION_NAMES)
    return {name: value for name, value in items if value != getattr(NO_OPTIONS, name)}


def recorded(options: ModelOptions) -> dict[str, Any]:
    """Return the options that are set as JSON values for `model_options`, for a file's metadata; no access tokens."""
    chosen = given_options(options)
    if options.lora:
        chosen["lora"] = [
            {
                "path": lora.path,
                "scale": lora.scale,
                **{name: value for name, value in lora.arguments.items() if name != "token"},
            }
            for lora in options.lora
        ]
    return chosen
