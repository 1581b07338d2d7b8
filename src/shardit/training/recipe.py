"""`TrainingRecipe`: what a run of training needs of a kind of model: modules, losses, micro-batches, samples and
files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from shardit.training.staged import Stages


@dataclass(frozen=True)
class MicroBatch:
    """Arguments of one call of a loss."""

    model: str
    """Name of the trained module that takes it, a key of `TrainingRecipe.models`."""
    data: Any
    """Tensors on the CPU and plain values; alike on all stages of a replica. It contains the seeds of its own noise."""
    weight: float
    """Its share of the mean: number of samples, or of label tokens."""
    items: tuple[str, ...]
    """Names of its data, for logs and errors."""


@dataclass(frozen=True)
class TrainingRecipe:
    """Models of a run, their data and their loss.

    All functions are pure: `micro_batches` depends on nothing but its arguments, the settings and the data. So a run
    resumes from the number of its step, any rank knows the data of any replica, and a loss draws the same
    numbers wherever it runs.

    A kind of model makes one: `recipe(settings, mesh, config)` in `training/diffusion/recipe.py` and
    `training/language/recipe.py`, with a `TrainSettings`, a `Mesh` and a `DiffusionParallelConfig`. All ranks call it
    together, after the global generators have been seeded alike. It raises InputError on all ranks, or on those that
    see the mistake.
    """

    models: Mapping[str, nn.Module]
    """The trained modules by the name of their component; adapters are in place and all that is not trained is frozen.
    A rank has at least the weights outside of blocks, and each block is on some rank of a pipeline; the others are on
    meta."""
    loss: Callable[[nn.Module, Any], Tensor]
    """loss(model, MicroBatch.data): a tensor with one number, the mean over the micro-batch's weight."""
    micro_batches: Callable[[int, int, int], list[MicroBatch]]
    """micro_batches(step, replica, replicas): those of one replica in an optimizer step, counted from 0."""
    steps_per_epoch: float
    """Optimizer steps of all replicas together in one pass over the data."""
    identity: Mapping[str, Any]
    """Digests by name of the data and settings that determine the micro-batches. A resumed run compares them, and
    accumulation and replicas by their product."""
    save: Callable[[Mapping[str, Stages], Path], None]
    """save(stages by name, folder): write the result; collective."""
    held_out: Callable[[], list[MicroBatch]] | None = None
    """The micro-batches of the validation, with fixed noise; None without such data."""
    sample: Callable[[Mapping[str, nn.Module], Path], list[Path]] | None = None
    """sample(models by name, folder): write samples and return their files. Collective over all ranks, of which the
    first one writes. The run has set the models to evaluation, without gradients, and puts modes and generators
    back."""
    notes: tuple[str, ...] = ()
    """Lines for the user before the first step: buckets, what was left out, what is trained."""
    unit: str = "samples"
    """Unit of weights: "samples" or "tokens"."""
