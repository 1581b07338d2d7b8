"""`Trained`: the models of a run on this rank, with their optimizer and average, and one step of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardit.config import DiffusionParallelConfig
from shardit.core.comm.mesh import Mesh
from shardit.core.placement.slices import Shards
from shardit.core.runtime.randomness import seed_all
from shardit.errors import InputError, listed
from shardit.training.recipe import TrainingRecipe
from shardit.training.run.run_folder import AVERAGE
from shardit.training.run.steps.average import Average
from shardit.training.run.steps.optimizers import make_optimizer
from shardit.training.run.steps.sharded import broadcast_owned, share_out
from shardit.training.run.steps.shares import Shares, example_of, examples
from shardit.training.seeds import derived
from shardit.training.settings import TrainSettings
from shardit.training.staged import Stages, stages

_SHOWN = 8
"""Names of data in a message."""


class Trained:
    """All methods are collective. parameters: those that this rank owns and trains, as MODEL/NAME; cuts: of those that
    are slices of a tensor rank; first: those of them that no earlier stage or tensor rank has, which this rank saves;
    updated: those whose optimizer state is on this rank."""

    def __init__(
        self, settings: TrainSettings, config: DiffusionParallelConfig, mesh: Mesh, recipe: TrainingRecipe, steps: int
    ):
        self.settings, self.mesh, self.recipe = settings, mesh, recipe
        self._examples = examples(recipe, mesh.sizes["dp"], steps)
        self.stages: dict[str, Stages] = {
            name: stages(
                model,
                recipe.loss,
                config,
                schedule=settings.schedule,
                example=self._examples.get(name),
                timeout_s=settings.timeout_s,
            )
            for name, model in recipe.models.items()
        }
        self.parameters: dict[str, nn.Parameter] = {}
        self.cuts: dict[str, Shards] = {}
        self.first: set[str] = set()
        for model, one in self.stages.items():
            owner, rank = one.cut_loss.holdings.owner, one.cut_loss.comm.rank
            for name, parameter in one.named_parameters():
                if not parameter.requires_grad:
                    continue
                key, cut = f"{model}/{name}", one.slices.cuts.get(name)
                self.parameters[key] = parameter
                self.cuts |= {} if cut is None else {key: cut}
                self.first |= {key} if owner[name] == rank and (cut or not one.slices.index) else set()
        self.owners: dict[str, int] = {}
        if settings.shard_optimizer and mesh.sizes["dp"] > 1:
            self.owners = share_out(self.parameters, mesh.sizes["dp"])
        replica = mesh.coords["dp"]
        self.updated = {key: one for key, one in self.parameters.items() if self.owners.get(key, replica) == replica}
        self.optimizer = make_optimizer(settings, self.updated)
        self.average = None if settings.ema_decay is None else Average(settings.ema_decay, self.parameters)

    @property
    def index(self) -> int:
        """The number of this rank among the tensor ranks."""
        return self.mesh.coords["tp"]

    @property
    def models(self) -> dict[str, nn.Module]:
        """The models by name."""
        return {name: one.model for name, one in self.stages.items()}

    def step(self, number: int, shares: Shares, rate: float) -> dict[str, Any]:
        """Make an optimizer step, counted from 0; return its loss and norm. Raises InputError if they are not
        finite, before any weight has changed."""
        seed_all(step_seed(self.settings.seed, number))
        losses = self._backward(number, shares)
        loss = math.fsum(value * shares.weights[name] / shares.weight for name, value in losses.items())
        norm = math.sqrt(math.fsum(float(one.grad_norm()) ** 2 for one in self.stages.values()))
        self._check_finite(number, shares, losses, norm)
        limit = self.settings.max_grad_norm
        if limit and norm > limit:
            _scale(self.parameters.values(), limit / (norm + 1e-6))
        self._update(rate)
        if self.average is not None:
            self.average.update()
        more = {"losses": losses} if len(self.stages) > 1 else {}
        return {"loss": loss if losses else None, "lr": rate, "grad_norm": norm, **more}

    def _update(self, rate: float) -> None:
        """Run the optimizer; with its state over replicas, each of them on its part."""
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        if self.owners:
            broadcast_owned(self.parameters, self.owners, self.mesh.axes["dp"])
        for parameter in self.parameters.values():
            parameter.grad = None

    def _backward(self, number: int, shares: Shares) -> dict[str, float]:
        """Compute the gradients of the mean over the micro-batches of all models; return the mean of each model."""
        losses: dict[str, float] = {}
        for name, one in self.stages.items():
            if not shares.weights[name]:
                continue
            if name not in self._examples:
                self._examples[name] = example_of(self.recipe, name, number, self.mesh.sizes["dp"])
            mine = shares.mine.get(name, [])
            value = one.step([b.data for b in mine], [b.weight for b in mine], example=self._examples[name])
            losses[name] = float(value)
            share = shares.weights[name] / shares.weight
            if share != 1:
                _scale(one.parameters(), share)
        return losses

    def _check_finite(self, number: int, shares: Shares, losses: dict[str, float], norm: float) -> None:
        wrong = next((name for name, value in losses.items() if not math.isfinite(value)), None)
        if wrong is None and math.isfinite(norm):
            return
        names = [item for model, item in shares.items if wrong in (None, model)]
        what = f"the norm of the gradients is {norm}" if wrong is None else f"the loss is {losses[wrong]}"
        of_model = f" of {wrong}" if wrong is not None and len(self.stages) > 1 else ""
        raise InputError(
            f"step {number + 1}: {what}{of_model}, with the data {listed(names, _SHOWN)}; lower learning_rate, or use "
            "dtype=float32; the weights are those of the step before"
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the average into the models for a while."""
        with nullcontext() if self.average is None else self.average.in_place():
            yield

    def save(self, folder: Path) -> None:
        """Write the result; with an average that as well, into a folder of its own. Raises InputError on all ranks."""
        self.recipe.save(self.stages, folder)
        if self.average is not None:
            with self.averaged():
                self.recipe.save(self.stages, folder / AVERAGE)


def step_seed(seed: int, step: int) -> int:
    """Return the seed of the generators in a step."""
    return derived(seed, "step", step)


def _scale(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply gradients by a number."""
    for parameter in parameters:
        if parameter.grad is not None:
            with torch.no_grad():
                parameter.grad.mul_(factor)
