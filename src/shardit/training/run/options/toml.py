"""Reads the settings of a run from a TOML file; what is unknown or in the wrong place is an error."""

from __future__ import annotations

import dataclasses
import importlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardit.config import DiffusionParallelConfig
from shardit.errors import InputError, did_you_mean, first_line
from shardit.loading.missing_packages import missing_package
from shardit.settings.declare import Flag, declared
from shardit.settings.paths import check_name
from shardit.training.settings import TrainSettings

AXES = (
    "pipeline_parallel_size",
    "tensor_parallel_size",
    "data_parallel_size",
    "pipeline_chunks",
    "layer_partition",
)
"""The settings of the parallel configuration that training has."""

_ELSEWHERE = {
    "activation_checkpointing": "gradient_checkpointing",
    "alpha": "lora_alpha",
    "checkpoint_every_n_steps": "save_every",
    "dataset": "data",
    "ema": "ema_decay",
    "frames": "num_frames",
    "gradient_accumulation_steps": "accumulation",
    "gradient_clipping": "max_grad_norm",
    "lr": "learning_rate",
    "lr_scheduler": "lr_schedule",
    "max_steps": "steps",
    "max_train_steps": "steps",
    "micro_batch_size_per_gpu": "batch_size",
    "model_path": "model",
    "num_repeats": "repeats",
    "num_train_epochs": "epochs",
    "output_dir": "output",
    "pipeline_stages": "pipeline_parallel_size",
    "prompts": "sample_prompts",
    "rank": "lora_rank",
    "save_every_n_steps": "save_every",
    "target_modules": "lora_targets",
    "targets": "lora_targets",
    "train_batch_size": "batch_size",
    "train_data_dir": "data",
    "use_rslora": "lora_rslora",
}
"""Names that other programs have for settings."""

_OF_OPTIMIZERS = ("amsgrad", "beta2_decay", "betas", "d_coef", "dampening", "decouple", "eps", "momentum", "nesterov")
"""Arguments of optimizers that are likely to be put in the wrong place."""


def fields() -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Return the settings that a file can have, by key: the declared field and its type."""
    found = {}
    for cls, only in ((TrainSettings, ()), (DiffusionParallelConfig, AXES)):
        hints = typing.get_type_hints(cls)
        for item in declared(cls):
            flag = item.metadata["flag"]
            if flag is not None and (not only or item.name in only):
                found[flag.name or item.name] = item, hints[item.name]
    return found


def read_toml(path: Path) -> dict[str, Any]:
    """Return the settings of a TOML file by name. Raises InputError, which names the file and the key."""
    known, found = fields(), {}
    for key, value in _parsed(path).items():
        if key not in known:
            raise InputError(f"{path}: {_unknown(key, value, list(known))}")
        item, kind = known[key]
        _check_place(path, key, value, item.metadata["flag"], known)
        found[item.name] = _checked(path, key, _converted(path, key, value, kind, item.metadata["flag"]), item)
    return found


def _parsed(path: Path) -> dict[str, Any]:
    check_name("--config", path)
    try:
        parser = _parser()
        return parser.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise InputError(f"--config {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # also of bytes that are no text
        raise InputError(f"--config {path} is no TOML: {first_line(error)}") from error


def _parser() -> Any:
    for name in ("tomllib", "tomli"):  # the first is part of Python from 3.11 on
        try:
            return importlib.import_module(name)
        except ImportError as error:
            missing = error
    raise missing_package(missing)


def _unknown(key: str, value: Any, known: list[str]) -> str:
    """Say what is wrong with a key that is no setting, and where it belongs."""
    if isinstance(value, Mapping):
        inside = next((name for name in value if name in known), None)
        if inside is not None:
            return f"{key}.{inside} belongs at the top of the file, outside of tables: write {inside} = ... there"
        return f"there is no table [{key}]{_nearest(key, known)}; settings stand at the top, outside of tables"
    if key in _OF_OPTIMIZERS:
        return f"{key} is an argument of the optimizer: it belongs into the table [optimizer_args]"
    return f"there is no key {key!r}{_nearest(key, known)}; `shardit train --help` lists all (as --flags)"


def _nearest(key: str, known: list[str]) -> str:
    plain = key.replace("-", "_").lower()
    if plain in known or plain in _ELSEWHERE:
        return f" (did you mean {_ELSEWHERE.get(plain, plain)!r}?)"
    return did_you_mean(plain, known)


def _check_place(path: Path, key: str, value: Any, flag: Flag, known: Mapping[str, Any]) -> None:
    """Raise InputError for a table in place of a value, and for a setting within a table of arguments."""
    if flag.example:
        if not isinstance(value, Mapping):
            raise InputError(f"{path}: {key} is a table of names and values: write them below a line [{key}]")
        for name in value:
            if name in known:
                raise InputError(f"{path}: {key}.{name} is a setting of the run: it belongs above the line [{key}]")
            if name in _ELSEWHERE:
                raise InputError(f"{path}: {key}.{name} belongs above the line [{key}], as {_ELSEWHERE[name]}")
    elif isinstance(value, Mapping):
        where = f"; arguments belong into [{key}_args]" if f"{key}_args" in known else ""
        raise InputError(f"{path}: {key} is one value, not a table: write {key} = ... at the top{where}")


def _converted(path: Path, key: str, value: Any, kind: Any, flag: Flag) -> Any:
    """Return a value of TOML as the setting has it."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if flag.example:
        return dict(value)
    if flag.each is not None:
        if not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            raise InputError(f'{path}: {key} must be a list of texts, such as {key} = ["..."], got {value!r:.200}')
        if not value:
            raise InputError(f"{path}: {key} is an empty list: leave it out for the default, or name one")
        return tuple(map(flag.each, value))
    if flag.read is not None and isinstance(value, str):
        return flag.read(value)
    if isinstance(value, list):
        if flag.read is None:
            raise InputError(f"{path}: {key} must be one value, got {value!r:.200}")
        return tuple(value)
    if bool in kinds and not isinstance(value, bool):
        raise InputError(f"{path}: {key} must be true or false, got {value!r:.200}")
    if isinstance(value, int) and not isinstance(value, bool) and int not in kinds:
        return float(value) if float in kinds else str(value) if str in kinds else value
    if Path in kinds and isinstance(value, str) and value:
        return Path(value)
    if (str in kinds or Path in kinds) and not isinstance(value, (str, Path)):
        raise InputError(f"{path}: {key} must be a text in quotes, got {value!r:.200}")
    return value


def _checked(path: Path, key: str, value: Any, item: dataclasses.Field[Any]) -> Any:
    check = item.metadata["check"]
    if check is not None and (problem := check.problem(value)):
        raise InputError(f"{path}: {key} must be {problem}, got {value!r:.200}")
    return value
