"""Files of a result: LoRA files for `load_lora_weights`, or a whole pipeline folder for `from_pretrained`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from shardit.core.comm.group import GroupCoordinator
from shardit.errors import InputError

if TYPE_CHECKING:
    from shardit.training.staged import Stages

_LORA = "pytorch_lora_weights.safetensors"
_INDEX = "model_index.json"
_LINKED = 2**20
"""Bytes from which on a file of a component that was not trained is linked rather than copied, if the disk can."""


def save_lora(stages: Mapping[str, Stages], folder: Path, ranks: GroupCoordinator) -> None:
    """Write the LoRA file into the folder, that of a second expert into a folder in it with the expert's name.
    Collective; raises InputError on all ranks."""
    for number, (name, staged) in enumerate(stages.items()):
        whole = folder / f".{name}"
        staged.save_pretrained(whole)
        target = folder / name if number else folder
        on_first(ranks, folder, lambda: _move(whole, target))  # noqa: B023


def _move(whole: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    (whole / _LORA).replace(target / _LORA)
    whole.rmdir()


def save_pipeline(stages: Mapping[str, Stages], source: Path, folder: Path, ranks: GroupCoordinator) -> None:
    """Write a pipeline folder: the trained modules, and the other components from the source. The index comes last,
    so that a folder with an index is whole. Collective; raises InputError on all ranks."""
    for name, staged in stages.items():
        staged.save_pretrained(folder / name)
    on_first(ranks, folder, lambda: _copy_others(source, folder, {*stages}))


def _copy_others(source: Path, folder: Path, trained: set[str]) -> None:
    for path in sorted(source.rglob("*")):
        place = path.relative_to(source)
        hidden = any(part.startswith(".") for part in place.parts)
        if not path.is_file() or hidden or place.parts[0] in trained or len(place.parts) == 1:
            continue
        _copy(path.resolve(), folder / place)
    _copy((source / _INDEX).resolve(), folder / _INDEX)


def _copy(path: Path, target: Path) -> None:
    """Copy or link a file under another name, and rename it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        try:
            if path.stat().st_size < _LINKED:
                raise OSError
            os.link(path, partial)
        except OSError:
            shutil.copyfile(path, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def on_first(ranks: GroupCoordinator, target: Path, act: Callable[[], None]) -> None:
    """Run a function on the first rank; raises InputError on all ranks if it cannot write."""
    problem = None
    if ranks.is_first_rank:
        try:
            act()
        except OSError as error:
            problem = f"{target} cannot be written ({error.strerror or error})"
    if problem := ranks.broadcast_object(problem):
        raise InputError(problem)
