"""Compares the gradients of the first micro-batch over the stages with those without a schedule: of the whole model, if
every rank has it and memory for it; else those of all ranks together, block by block.

It costs two forwards and backwards, once: of the whole model, and over the stages.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from shardit.core.comm.group import GroupCoordinator
from shardit.core.comm.p2p import Comm
from shardit.core.modules.blocks import CutModel, inner_tensors
from shardit.core.modules.state.buffers import buffers_kept
from shardit.core.training.first_loss import WatchedLoss
from shardit.core.training.gradients.block_by_block import BlockNodes
from shardit.core.training.gradients.holdings import Holdings
from shardit.core.training.gradients.sums import sum_gradients
from shardit.core.training.schedules import Schedules
from shardit.core.training.segment import LossRun, StepData
from shardit.errors import RankError, UnsupportedError, first_line

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
class Expected:
    """Gradients of a micro-batch, by the names of parameters; without those that this rank has no part in. half: it was
    computed in 16 bits, in part. how: for the log."""

    of: dict[str, torch.Tensor | None]
    half: bool
    how: str


def expected_gradients(
    run: LossRun, comm: Comm, replica: GroupCoordinator, step: StepData, watched: WatchedLoss
) -> Expected | None:
    """Return the gradients of the watched micro-batch of `step`, before blocks are released; None if they cannot be
    computed. Collective over the stages and their tensor ranks, the `replica`."""
    model, layouts = run.cut.model, watched.layouts.items()
    if any(one._backward_hooks or one._post_accumulate_grad_hooks for one in model.parameters()):
        _log.info("the first gradients are not compared: a parameter has a hook")
        return None
    outputs = sum(layout.nbytes for address, layout in layouts if address.kind == "out")
    needed = KEPT * outputs + 2 * sum(one.nbytes for one in model.parameters() if one.requires_grad)
    whole = run.plain.whole and all(replica.gather_objects(needed < free_bytes(run.device)))
    names = None if whole else _apart(run.cut, comm.rank)
    calls, found, problem = (None if whole else BlockNodes(run.cut, comm)), {}, None
    with _without_gradients(model.parameters()), buffers_kept(model), torch.enable_grad():
        try:
            with run.cut.calls.intercepted_by(calls), run.plain.replayed(step.plain.get(0, [])):
                run.fresh(step.batches[0], step.seeds[0]).backward()
            trained = ((name, one) for name, one in model.named_parameters() if one.requires_grad)
            found = {name: one.grad for name, one in trained if names is None or name in names}
        except RankError:
            raise
        except Exception as error:  # of memory, or of a block that cannot run twice
            problem = f"{type(error).__name__}: {first_line(error)}"
    problem = next((one for one in replica.gather_objects(problem) if one), None)
    if problem is not None:
        _log.info("the first gradients are not compared: %s", problem)
        return None
    half = watched.autocast or any(layout.dtype in HALVES for _, layout in layouts)
    return Expected(found, half, "of the whole model" if whole else "of all ranks block by block")


def _apart(cut: CutModel, rank: int) -> set[str]:
    """Return the names of parameters that are in blocks of this rank alone, or outside of blocks alone: if a weight is
    tied over these, each rank has a part of its gradient."""
    within: dict[int, set[int]] = {}
    for (_, block), owner in zip(cut.blocks, cut.owners, strict=True):
        for parameter in block.parameters():
            within.setdefault(id(parameter), set()).add(owner)
    inner = inner_tensors(cut.model, cut.blocks)
    tied = {key for key, owners in within.items() if owners != {rank} or key not in inner}
    return {name for name, one in cut.model.named_parameters() if id(one) not in tied}


def compare_gradients(
    schedules: Schedules, step: StepData, comm: Comm, replica: GroupCoordinator, held: Holdings, expected: Expected
) -> None:
    """Run a step of one micro-batch over the stages, and compare its gradients. Collective; raises UnsupportedError on
    all ranks of the replica if one differs."""
    run = schedules.run
    own = {name: one for name, one in held.own.items() if name in expected.of}
    with _without_gradients(run.cut.model.parameters()), buffers_kept(run.cut.model), torch.enable_grad():
        schedules.step([0], step)
        sum_gradients(list(held.shared.values()), comm.group)
        differences = _differences({name: one.grad for name, one in own.items()}, expected.of)
    bounds = {name: CLOSE_HALF if expected.half else CLOSE.get(own[name].dtype, CLOSE_HALF) for name in differences}
    largest = max(differences, key=lambda name: differences[name] / bounds[name], default=None)
    mine = None if largest is None else (differences[largest] / bounds[largest], differences[largest], largest)
    of_ranks = [one for one in replica.gather_objects(mine) if one is not None]
    if not of_ranks:
        return
    share, difference, name = max(of_ranks)
    if share > 1:
        raise UnsupportedError(
            f"{run.cut.name}: over the stages the gradient of {name} differs from that {expected.how} by "
            f"{difference:.1g} of its norm: use pipeline_parallel_size=1, and report the model"
        )
    _log.info(
        "the first gradients are those %s: %d parameters on this rank, largest difference %.1e (%s)",
        expected.how,
        len(differences),
        difference,
        name,
    )


def _differences(
    got: Mapping[str, torch.Tensor | None], expected: Mapping[str, torch.Tensor | None]
) -> dict[str, float]:
    """Return the norms of the differences of gradients, relative to those that are expected."""
    squares = {name: float(one.double().square().sum()) for name, one in expected.items() if one is not None}
    count = sum(one.numel() for one in expected.values() if one is not None)
    average = math.sqrt(math.fsum(squares.values()) / count) if count else 0.0
    found = {}
    for name, one in got.items():
        want = expected[name]
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
