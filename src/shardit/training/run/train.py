"""A run of training on one rank, from its settings to the saved result."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardit.config import DiffusionParallelConfig
from shardit.core.comm.group import GroupCoordinator
from shardit.core.comm.mesh import Mesh
from shardit.core.runtime.randomness import seed_all
from shardit.errors import InputError, RankError
from shardit.training.recipe import TrainingRecipe
from shardit.training.run.checkpoint import Checkpoints, TrainingCheckpoint, find, restore
from shardit.training.run.report import Report
from shardit.training.run.resume import compare, record_of
from shardit.training.run.run_folder import AVERAGE, CHECKPOINTS, SAMPLES
from shardit.training.run.steps.optimizers import try_optimizer
from shardit.training.run.steps.rates import check_warmup, rate
from shardit.training.run.steps.shares import Shares, draw
from shardit.training.run.steps.trained import Trained
from shardit.training.run.steps.validation import held_out_loss, samples
from shardit.training.settings import STEPS, TrainSettings


def train(
    settings: TrainSettings,
    config: DiffusionParallelConfig,
    mesh: Mesh,
    make: Callable[[TrainSettings, Mesh, DiffusionParallelConfig], TrainingRecipe],
    stop: Callable[[], bool] = lambda: False,
    began: Callable[[], None] = lambda: None,
) -> bool:
    """Train with these settings, and save the result; return whether `stop` ended the run before its last step.

    Collective over all ranks. began() is called before the first step. Raises InputError, RankError.
    """
    assert settings.output is not None  # it was checked
    try_optimizer(settings, mesh.device)
    try:
        settings.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {settings.output} cannot be made: {error.strerror}; name another") from error
    if mesh.rank == 0:
        print(f"loading {settings.model} and {settings.data} ...", file=sys.stderr, flush=True)
    seed_all(settings.seed)
    return Run(settings, config, mesh, make(settings, mesh, config)).run(stop, began)


def steps_of(settings: TrainSettings, recipe: TrainingRecipe) -> int:
    """Return the number of optimizer steps."""
    if settings.epochs is not None:
        return max(1, math.ceil(settings.epochs * recipe.steps_per_epoch - 1e-9))
    return settings.steps or STEPS


class Run:
    """The parts of a run. All methods are collective."""

    def __init__(self, settings: TrainSettings, config: DiffusionParallelConfig, mesh: Mesh, recipe: TrainingRecipe):
        assert settings.output is not None
        self.settings, self.mesh, self.recipe, self.output = settings, mesh, recipe, settings.output
        self.world = GroupCoordinator.of_mesh(mesh)["world"]
        self.steps = steps_of(settings, recipe)
        check_warmup(settings, self.steps)
        self.record = record_of(settings, config, recipe)
        self.start = self.world.broadcast_object(self._newest())
        if isinstance(self.start, InputError):
            raise self.start
        notes = [*recipe.notes, *self._compared(self.start)]
        self.trained = Trained(settings, config, mesh, recipe, self.steps)
        if self.start is not None:
            restore(self.trained, self.start)
        self.done = self.start.step if self.start else 0
        self.saved = self.done if self.start else None
        self.checkpoints = Checkpoints(self.output, self.world, settings.keep, self.record)
        self.held_out = recipe.held_out() if recipe.held_out is not None and settings.validate_every else []
        leads = self.world.is_first_rank
        self.report = Report(self.output, leads, self.steps, self.done, settings.tensorboard)
        for note in notes:
            self.report.note(note)

    def _newest(self) -> TrainingCheckpoint | InputError | None:
        """On the first rank: return the checkpoint to go on at, or what is wrong."""
        if not self.world.is_first_rank or not self.settings.resume:
            return None
        try:
            return next(iter(find(self.output)), None)
        except InputError as error:
            return error

    def _compared(self, start: TrainingCheckpoint | None) -> list[str]:
        if start is None:
            missing = f"there is no checkpoint in {self.output} yet: the run begins at step 1"
            return [missing] if self.settings.resume else []
        notes = compare(start.record, self.record, self.output)
        if start.step > self.steps:
            raise InputError(
                f"--resume: the run has done {start.step} steps, of {self.steps} that are asked for: raise steps"
            )
        return [*notes, f"the run goes on after step {start.step}"]

    def run(self, stop: Callable[[], bool], began: Callable[[], None]) -> bool:
        """Make all steps that are left, unless `stop` ends them, and save the result."""
        begin, before = time.perf_counter(), self.done
        try:
            began()
            while self.done < self.steps:
                shares = draw(self.recipe, self.done, self.mesh, self.world, stop())
                if shares.stop:
                    self._save_checkpoint()
                    at = (
                        "the run stopped before its first checkpoint"
                        if self.saved is None
                        else (f"the run stopped after step {self.done}; --resume goes on after step {self.saved}")
                    )
                    self.report.print_line(at)
                    return True
                self._step(shares)
            self._save_checkpoint()
        finally:
            self.report.close()
        self._finish(self.done - before, time.perf_counter() - begin)
        return False

    def _step(self, shares: Shares) -> None:
        begin = time.perf_counter()
        lr = rate(self.settings, self.done, self.steps)
        found = self.trained.step(self.done, shares, lr)
        seconds = time.perf_counter() - begin
        self.done += 1
        names = [item for _, item in shares.items]
        row: dict[str, Any] = {"step": self.done, **found, "seconds": round(seconds, 4), "samples": shares.samples}
        if self.recipe.unit == "tokens":
            row["tokens"] = shares.weight
        self.report.row({**row, **self._evaluate(), "items": names})
        if self.settings.save_every and self.done % self.settings.save_every == 0:
            self._save_checkpoint()

    def _evaluate(self) -> dict[str, Any]:
        """Compute the loss on held-out data and make samples, if this step has any."""
        chosen, models, found = self.settings, self.trained.models, {}
        if chosen.validate_every and self.held_out and self.done % chosen.validate_every == 0:
            value = held_out_loss(self.recipe, self.held_out, models, self.mesh, chosen.seed)
            found["held_out_loss"] = value
        if chosen.sample_every and self.done % chosen.sample_every == 0:
            folder = self.output / SAMPLES / f"step-{self.done:08d}"
            gather = self.world.gather_objects
            files, problem = samples(self.recipe, models, self.mesh, chosen.seed, folder, gather)
            for file in files:
                self.report.print_line(str(file))
            if problem is not None:
                self.report.note(f"no samples of step {self.done}: {problem}")
        return found

    def _save_checkpoint(self) -> None:
        """Write a checkpoint, if there is none of this step. If that fails, the run goes on."""
        if self.saved == self.done:
            return
        problem = self.checkpoints.write(self.trained, self.done)
        if problem is None:
            self.saved = self.done
            return
        last = "there is none before" if self.saved is None else f"the last one is of step {self.saved}"
        self.report.note(
            f"no checkpoint of step {self.done} could be written to {self.output / CHECKPOINTS} ({problem}); {last}"
        )

    def _finish(self, steps: int, seconds: float) -> None:
        """Save the result. Raises InputError on all ranks if it cannot be written."""
        try:
            self.trained.save(self.output)
        except InputError as error:
            last = "" if self.saved is None else f"; the checkpoint of step {self.saved} is complete: use --resume"
            raise InputError(f"{error}{last}") from error
        except OSError as error:
            raise RankError(self.mesh.rank, f"the result cannot be written: {error}") from error
        if self.start is not None and self.trained.average is None and self.world.is_first_rank:
            self._remove_average(self.output / AVERAGE)
        self.report.print_line(f"{steps} steps in {seconds:.1f} s; the result is in {self.output}")

    def _remove_average(self, folder: Path) -> None:
        """Remove the average of the run that this one went on with: it is of fewer steps than the result."""
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
            done = "could not be removed: delete it" if folder.exists() else "is removed"
            self.report.note(f"{folder} held the average of an earlier step, and ema_decay is not given: it {done}")
