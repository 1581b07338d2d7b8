"""Compares the gradients of the first micro-batch over the stages with those of the whole model, before ranks release
the blocks of others.

It costs a forward and a backward of the whole model on each rank, and one of each stage, once. Ranks that never have
the whole model, or too little memory for this, do not compare.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardit.core.comm.p2p import Comm
from shardit.core.modules.state.buffers import buffers_kept
from shardit.core.training.gradients.holdings import Holdings
from shardit.core.training.gradients.sums import sum_gradients
from shardit.core.training.schedules import Schedules
from shardit.core.training.segment import LossRun, StepData
from shardit.core.training.watch import WatchedLoss
from shardit.errors import UnsupportedError

CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest difference of a gradient relative to its norm, by the type of the parameter."""
HALVES = (torch.bfloat16, torch.float16)
CLOSE_HALF = 0.1
"""The same for these types, and for any in a model that is computed in them."""
NOISE = 1e-2
"""A gradient counts as at least this share of what all have on average: that of a bias that has no effect is noise."""
KEPT = 20
"""Bytes that a block keeps for its backward, as a multiple of those of its output: about 34 per two bytes, see
Korthikanti et al. (2022), "Reducing Activation Recomputation in Large Transformer Models", equation 2."""

_log = logging.getLogger("shardit")


@dataclass
class WholeGradients:
    """Gradients of a micro-batch on one rank, by the names of parameters. half: it was computed in 16 bits, in part."""

    of: dict[str, torch.Tensor | None]
    half: bool

    def keep(self, names: Collection[str]) -> None:
        """Release all but those of these parameters."""
        self.of = {name: one for name, one in self.of.items() if name in names}


def whole_gradients(run: LossRun, comm: Comm, batch: Any, seed: int, watched: WatchedLoss) -> WholeGradients | None:
    """Return the gradients of a watched micro-batch, of the whole model on this rank; None if a rank lacks memory for
    them. Collective."""
    model, looks = run.cut.model, watched.looks.items()
    outputs = sum(look.nbytes for address, look in looks if address.kind == "out")
    needed = KEPT * outputs + 2 * sum(one.nbytes for one in model.parameters() if one.requires_grad)
    hooked = any(one._backward_hooks or one._post_accumulate_grad_hooks for one in model.parameters())
    fits = needed < free_bytes(run.device) and not hooked
    if not all(comm.group.gather_objects(fits)):
        why = "a parameter has a hook, or they need too much memory"
        _log.info("the first gradients are not compared with the whole model: %s (%.1f GiB)", why, needed / 2**30)
        return None
    found, problem = {}, None
    with _without_gradients(model.parameters()), buffers_kept(model), torch.enable_grad():
        try:
            run.fresh(batch, seed).backward()
            found = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
        except (MemoryError, torch.OutOfMemoryError) as error:
            problem = error
    if any(comm.group.gather_objects(problem is not None)):
        _log.info("the first gradients are not compared with the whole model: a rank has too little memory")
        return None
    half = watched.autocast or any(look.dtype in HALVES for _, look in looks)
    return WholeGradients(found, half)


def compare_gradients(schedules: Schedules, step: StepData, comm: Comm, held: Holdings, whole: WholeGradients) -> None:
    """Run a step of one micro-batch over the stages, and compare its gradients. Collective; raises UnsupportedError on
    all stages if one differs."""
    run = schedules.run
    own = {name: one for name, one in held.own.items() if one.requires_grad}
    with _without_gradients(run.cut.model.parameters()), buffers_kept(run.cut.model), torch.enable_grad():
        schedules.step([0], step)
        sum_gradients(list(held.shared.values()), comm.group)
        differences = _differences({name: one.grad for name, one in own.items()}, whole.of)
    bounds = {name: CLOSE_HALF if whole.half else CLOSE.get(own[name].dtype, CLOSE_HALF) for name in differences}
    largest = max(differences, key=lambda name: differences[name] / bounds[name], default=None)
    mine = None if largest is None else (differences[largest] / bounds[largest], differences[largest], largest)
    of_ranks = [one for one in comm.group.gather_objects(mine) if one is not None]
    if not of_ranks:
        return
    share, difference, name = max(of_ranks)
    if share > 1:
        raise UnsupportedError(
            f"{run.cut.name}: over the stages the gradient of {name} differs from that of the whole model by "
            f"{difference:.1g} of its norm: use pipeline_parallel_size=1, and report the model"
        )
    _log.info(
        "the first gradients are those of the whole model: %d parameters on this rank, largest difference %.1e (%s)",
        len(differences),
        difference,
        name,
    )


def _differences(got: Mapping[str, torch.Tensor | None], whole: Mapping[str, torch.Tensor | None]) -> dict[str, float]:
    """Return the norms of the differences of gradients, relative to those of the whole model."""
    squares = {name: float(one.double().square().sum()) for name, one in whole.items() if one is not None}
    count = sum(one.numel() for one in whole.values() if one is not None)
    average = math.sqrt(math.fsum(squares.values()) / count) if count else 0.0
    found = {}
    for name, one in got.items():
        want = whole[name]
        if one is None and want is None:
            continue
        size = (one if want is None else want).numel()  # pyright: ignore[reportOptionalMemberAccess]
        scale = max(math.sqrt(squares.get(name, 0.0)), NOISE * average * math.sqrt(size))
        apart = want if one is None else one if want is None else one.double() - want.double()
        found[name] = float(apart.double().norm()) / scale if scale else 0.0  # pyright: ignore[reportOptionalMemberAccess]
    return found


@contextmanager
def _without_gradients(parameters: Iterator[nn.Parameter]) -> Iterator[None]:
    """Set the gradients of parameters aside for a while."""
    before = {one: one.grad for one in parameters}
    for one in before:
        one.grad = None
    try:
        yield
    finally:
        for one, gradient in before.items():
            one.grad = gradient


def free_bytes(device: torch.device) -> float:
    """Return the free memory of a device, or of this machine for each rank on it; 0 if it is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", torch.distributed.get_world_size()))
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:")) * 1024 / ranks
    except (OSError, StopIteration):
        return 0.0
