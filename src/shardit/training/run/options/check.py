"""Finds mistakes in the settings of a run before torch is imported, and the kind of its model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from shardit.config import DiffusionParallelConfig
from shardit.diffusion.preflight import preflight
from shardit.errors import InputError, UnsupportedError
from shardit.language.loading.source import named_decoder
from shardit.language.preflight import check_decoder
from shardit.loading.dtypes import setting
from shardit.loading.index import base_model, read_adapter
from shardit.loading.missing_packages import FRAMEWORKS, check_installed, is_missing, pip_line
from shardit.settings.checks import text_problem
from shardit.settings.declare import check_declared
from shardit.settings.model_options import ModelOptions
from shardit.settings.paths import model_files, user_path
from shardit.training.data.sources.find import find_items
from shardit.training.language.only_diffusion import check_settings
from shardit.training.language.rows import read_rows
from shardit.training.limits import check_degrees
from shardit.training.run.run_folder import METRICS
from shardit.training.run.steps.rates import check_warmup
from shardit.training.settings import STEPS, TrainSettings

DIFFUSION, LANGUAGE = "shardit.training.diffusion.recipe", "shardit.training.language.recipe"
"""The modules that make the recipe of a kind of model."""

_PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}
"""Packages of optimizers that torch does not have."""

_BY_TENSOR = {
    "prodigy": "estimates one step size from all parameters",
    "adafactor": "has factors of whole rows and columns",
    "adamw8bit": "rounds blocks of whole tensors together",
}
"""Optimizers that do not treat each number by itself, and why slices of weights would be updated differently."""

HUB = "hf:"
_OTHER_DATA = ("shapes:", HUB)
"""Beginnings of data that is no path."""


def check(settings: TrainSettings, config: DiffusionParallelConfig) -> str:
    """Return the module that makes the recipe of the model. Raises InputError for mistakes that need no model."""
    check_declared(settings)
    check_degrees(config, settings.schedule)
    _check_given(settings)
    check_paths(settings)
    check_optimizer(settings, config)
    if settings.tensorboard and is_missing("tensorboard"):
        raise InputError(f"tensorboard: the package is not installed; {pip_line(['tensorboard'])}")
    if not settings.full and is_missing("peft"):
        raise InputError(f"a LoRA needs the package peft, which is not installed: {pip_line(['peft'])}; or use --full")
    return _check_model(settings, config)


def _check_given(settings: TrainSettings) -> None:
    """Raise InputError for what is missing, and for texts that are none."""
    for name, what in (
        ("model", "name a hub id, a folder or tiny/NAME"),
        ("data", "name a folder, a JSONL file, hf:NAME or shapes:moving"),
        ("output", "name the folder of the run"),
    ):
        if not getattr(settings, name):
            raise InputError(f"--{name} is missing: {what}")
    for name in ("model", "data", "validation_data", "sample_prompts", "lora_targets"):
        if problem := text_problem(getattr(settings, name)):
            raise InputError(f"--{name.replace('_', '-')} must be {problem}")
    if settings.epochs is None:  # their steps are known when the data have been read
        check_warmup(settings, settings.steps or STEPS)


def check_paths(settings: TrainSettings) -> None:
    """Raise InputError for folders that cannot be written, and for an output among the data."""
    for name in ("data", "validation_data"):
        text = getattr(settings, name)
        if text and settings.output is not None and not text.startswith(_OTHER_DATA):
            _check_apart(f"--{name.replace('_', '-')}", text, settings.output)
    for name in ("output", "cache"):
        if (value := getattr(settings, name)) is not None:
            _check_folder(f"--{name}", user_path(f"--{name}", value))
    if settings.output is not None and (settings.output / METRICS).exists() and not settings.resume:
        raise InputError(f"--output {settings.output} has a run already: add --resume, or name another folder")
    if settings.output is not None and not (settings.output / METRICS).exists():
        _check_without_model(settings.output)


def _check_without_model(output: Path) -> None:
    """Raise InputError for a folder with a model that no run has made: the result would replace its files."""
    folder = user_path("--output", output)
    if model := model_files(folder):
        raise InputError(f"--output {output} holds a model ({model[0]}), which a run replaces: name another folder")


def _check_apart(flag: str, data: str, output: Path) -> None:
    """Raise InputError for an output in a folder of data: a resumed run would read its own samples and metrics."""
    folder, inside = user_path(flag, data).resolve(), user_path("--output", output).resolve()
    if folder.is_dir() and inside.is_relative_to(folder):
        raise InputError(
            f"--output {output} lies in {flag} {data}, and would be read as data when the run goes on: name a folder "
            "outside of it"
        )


def _check_folder(flag: str, path: Path) -> None:
    """Raise InputError for a path that is no folder and cannot become one."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{flag} {path} is a file: name a folder")
    first = next((one for one in (path, *path.absolute().parents) if one.exists()), None)
    if first is not None and not first.is_dir():
        raise InputError(f"{flag} {path}: {first} is a file; name another folder")
    if first is not None and not os.access(first, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path}: no permission to write to {first}; name another folder")


def check_optimizer(settings: TrainSettings, config: DiffusionParallelConfig) -> None:
    """Raise InputError for an optimizer whose package is missing, UnsupportedError for one that cannot be right."""
    name = settings.optimizer
    if name == "prodigy" and config.pipeline_parallel_size > 1:
        raise UnsupportedError(
            f"optimizer=prodigy estimates one step size from all parameters, of which each of "
            f"{config.pipeline_parallel_size} stages has a part: use pipeline_parallel_size=1, or optimizer=adamw"
        )
    if name in _BY_TENSOR and config.tensor_parallel_size > 1:
        raise UnsupportedError(
            f"optimizer={name} {_BY_TENSOR[name]}, of which each of {config.tensor_parallel_size} tensor ranks has a "
            "slice: use tensor_parallel_size=1, or optimizer=adamw"
        )
    if name == "prodigy" and settings.shard_optimizer:
        raise UnsupportedError(
            "optimizer=prodigy estimates one step size from all parameters, of which each replica would have a part: "
            "leave shard_optimizer out, or use optimizer=adamw"
        )
    if settings.shard_optimizer and config.data_parallel_size == 1:
        raise InputError("shard_optimizer has an effect with several replicas alone: raise data_parallel_size")
    if name in _PACKAGES and is_missing(_PACKAGES[name]):
        package = _PACKAGES[name]
        raise InputError(f"optimizer={name} needs the package {package}, which is not installed: {pip_line([package])}")


def _check_data(settings: TrainSettings, read: Callable[[str, str], object]) -> None:
    """Raise InputError for rows and files that are wrong. The ranks read them again."""
    for name in ("data", "validation_data"):
        if text := getattr(settings, name):
            read(name, text)


def _find_items(name: str, text: str) -> None:
    """Find the items of images and clips, but for those that have to be downloaded."""
    if text.startswith(HUB):
        check_installed(["datasets"])
    else:
        find_items(text, held_out=name == "validation_data")


def _check_model(settings: TrainSettings, config: DiffusionParallelConfig) -> str:
    check_installed(FRAMEWORKS)
    sliced = DiffusionParallelConfig(tensor_parallel_size=config.tensor_parallel_size)
    dtype = setting(settings.dtype, "--dtype")
    if read_adapter(user_path("--model", settings.model)):
        raise InputError(
            f"--model {settings.model} holds an adapter, no model: give the model that it was trained on"
            f"{base_model(settings.model)}; its run goes on with --output {settings.model} --resume"
        )
    source = named_decoder(settings.model)
    if source is not None:
        check_settings(settings)
        _check_data(settings, read_rows)
        check_decoder(source, sliced, None)
        return LANGUAGE
    check_installed(("diffusers",))
    _check_data(settings, _find_items)
    preflight.check(settings.model, sliced, ModelOptions(), dtype=dtype)
    return DIFFUSION
