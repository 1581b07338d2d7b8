"""Checkpoints: written under another name and renamed when complete, so that the last good one is never lost."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardit.core.comm.group import GroupCoordinator
from shardit.errors import InputError, first_line
from shardit.training.run.run_folder import CHECKPOINTS, RECORD
from shardit.training.run.steps.optimizers import found_by, set_found, set_state, state_of
from shardit.training.run.steps.trained import Trained
from shardit.training.run.tensor_pieces import Contents, own_part, pieces_of, place_of

_FIELDS = {"step", "files", "average_updates", "settings", "identity"}
"""Required entries of a record."""


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A checkpoint on the disk. step: optimizer steps done. record: what the run was."""

    folder: Path
    step: int
    record: dict[str, Any]


def find(output: Path) -> list[TrainingCheckpoint]:
    """Return the complete checkpoints of a run, the newest first. Raises InputError if one is damaged."""
    found = []
    for folder in (output / CHECKPOINTS).glob("step-*"):
        try:
            record = json.loads((folder / RECORD).read_text("utf-8"))
            if missing := _FIELDS - record.keys():
                raise KeyError(min(missing))
            found.append(TrainingCheckpoint(folder, int(record["step"]), record))
        except FileNotFoundError:
            continue  # it was being removed
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"the checkpoint {folder} is damaged: delete it, to go on at the one before") from error
    return sorted(found, key=lambda one: -one.step)


class Checkpoints:
    """Those of a run. All methods are collective."""

    def __init__(self, output: Path, world: GroupCoordinator, keep: int, record: dict[str, Any]):
        self._root, self._world, self._keep, self._record = output / CHECKPOINTS, world, keep, record

    def write(self, trained: Trained, step: int) -> str | None:
        """Write a checkpoint and remove those that are too many; return what went wrong, the same on all ranks. Then
        the earlier ones are as they were."""
        partial, folder = self._root / f".partial-{step:08d}", self._root / f"step-{step:08d}"
        problem = self._together(lambda: self._begin(partial), self._world.is_first_rank)
        if problem is None:
            replica = trained.mesh.coords["dp"]
            name = file_name(trained.mesh.pp_rank, trained.index, replica)
            writes = replica == 0 or bool(trained.owners)
            problem = self._together(lambda: _write(partial / name, lambda path: _save(trained, path)), writes)
        if problem is None:
            count = 0 if trained.average is None else trained.average.updates
            parts = trained.mesh.sizes["dp"] if trained.owners else 1
            sizes = trained.mesh.pp_size, trained.mesh.sizes["tp"], parts
            files = [file_name(*numbers) for numbers in itertools.product(*map(range, sizes))]
            record = {**self._record, "step": step, "files": files, "average_updates": count}
            problem = self._together(lambda: self._end(partial, folder, record), self._world.is_first_rank)
        if problem is not None:
            self._together(lambda: shutil.rmtree(partial, ignore_errors=True), self._world.is_first_rank)
        return problem

    def _together(self, act: Callable[[], None], here: bool) -> str | None:
        """Act on some ranks; return the problem of the first one that has any, on all ranks."""
        problem = None
        if here:
            try:
                act()
            except (OSError, RuntimeError) as error:
                # If the disk is full, torch raises RuntimeError after the OSError.
                known = error.__context__ if isinstance(error.__context__, OSError) else error
                problem = (isinstance(known, OSError) and known.strerror) or first_line(known)
        return next((one for one in self._world.gather_objects(problem) if one), None)

    def _begin(self, partial: Path) -> None:
        incomplete = (one for one in self._root.glob("step-*") if not (one / RECORD).exists())
        for left in (*self._root.glob(".partial-*"), *incomplete):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)

    def _end(self, partial: Path, folder: Path, record: dict[str, Any]) -> None:
        _write(partial / RECORD, lambda path: path.write_text(json.dumps(record, indent=1, default=str), "utf-8"))
        if folder.exists():
            _remove(folder)
        partial.rename(folder)
        _sync(self._root)
        for old in find(self._root.parent)[self._keep :]:
            _remove(old.folder)


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file and wait until it is on the disk."""
    write(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; without its record it is none any more, wherever this is interrupted."""
    (folder / RECORD).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def file_name(stage: int, piece: int, replica: int) -> str:
    """Return the name of the file of a rank. Tensor ranks after the first write their slices. Replicas after the first
    write the state of the optimizer that they alone have."""
    return f"stage-{stage}{f'-slice-{piece}' if piece else ''}{f'-replica-{replica}' if replica else ''}.pt"


def _save(trained: Trained, path: Path) -> None:
    """Write what this rank is the first to have, by names that do not depend on the numbers of ranks; with the places
    of slices in their whole tensors."""
    own = {name: one for name, one in trained.parameters.items() if name in trained.first}
    updated = {name: one for name, one in own.items() if name in trained.updated}
    places = {name: place_of(cut, trained.index) for name, cut in trained.cuts.items() if name in own}
    own = own if trained.mesh.coords["dp"] == 0 else {}
    average = {} if trained.average is None else trained.average.values
    content = {
        "parameters": {name: _compact(one.detach()) for name, one in own.items()},
        "optimizer": state_of(trained.optimizer, updated),
        "found": found_by(trained.optimizer),
        "average": {name: value for name, value in average.items() if name in own},
        "places": places,
    }
    with path.open("wb") as file:
        torch.save(content, file)


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or a copy if it is a part of larger memory, all of which would be written."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def restore(trained: Trained, checkpoint: TrainingCheckpoint) -> None:
    """Set weights, optimizer and average to those of a checkpoint, written by whatever numbers of ranks. Raises
    InputError."""
    contents = [_read(checkpoint.folder / name) for name in checkpoint.record["files"]]
    missing = trained.parameters.keys() - {name for content in contents for name in content["parameters"]}
    if missing:
        raise InputError(f"the checkpoint {checkpoint.folder} has no {min(missing)}: it is of another model or LoRA")
    for name in trained.parameters:
        _restore(trained, name, contents)
    if trained.optimizer is not None:
        for name in trained.updated:
            _restore_state(trained, trained.optimizer, name, contents)
        for content in contents:
            set_found(trained.optimizer, content["found"])
    if trained.average is not None:
        trained.average.updates = checkpoint.record["average_updates"]


def _read(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch has many for a damaged file
        raise InputError(f"{path} is damaged: delete {path.parent}, to go on at the one before") from error


@torch.no_grad()
def _restore(trained: Trained, name: str, contents: Contents) -> None:
    parameter, cut = trained.parameters[name], trained.cuts.get(name)
    value = own_part(pieces_of(contents, "parameters", name), cut, trained.index)
    if value.shape != parameter.shape or value.dtype != parameter.dtype:
        raise InputError(
            f"the checkpoint has {name} as {value.dtype} of shape {tuple(value.shape)}, this run as "
            f"{parameter.dtype} of shape {tuple(parameter.shape)}: it is of another model or LoRA"
        )
    parameter.copy_(value)
    if trained.average is not None:
        averages = pieces_of(contents, "average", name)
        trained.average.values[name].copy_(own_part(averages, cut, trained.index) if averages else parameter.float())


def _restore_state(trained: Trained, optimizer: torch.optim.Optimizer, name: str, contents: Contents) -> None:
    states, cut = pieces_of(contents, "optimizer", name), trained.cuts.get(name)
    if not states:
        return
    parameter, found = trained.updated[name], dict(states[0][0])
    for key, value in found.items():
        if isinstance(value, torch.Tensor) and value.ndim == parameter.ndim > 0:
            found[key] = own_part([(state[key], place) for state, place in states], cut, trained.index)
    set_state(optimizer, parameter, found)
