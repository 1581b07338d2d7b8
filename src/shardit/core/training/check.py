"""Checks a plan: the loss over the stages, with NaN in every placeholder, must be that of the watched call.

This finds what torch does not see: numpy, attributes, caches.
"""

from __future__ import annotations

import math

import torch

from shardit.core.comm.p2p import Comm
from shardit.core.training.loss_plan import LossPlan
from shardit.core.training.segment import LossRun, Segment, StepData
from shardit.errors import RankError, UnsupportedError, listed

CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative difference by the type of the loss; layouts, and so rounding, may change at a cut."""


def check_plan(run: LossRun, plan: LossPlan, comm: Comm, step: StepData, expected: torch.Tensor) -> None:
    """Run the only micro-batch of `step` segment after segment. Collective; raises UnsupportedError on all stages."""
    received: list[torch.Tensor] = []
    got, problem = math.nan, None
    of_segment: dict[int, list[torch.Tensor]] = {}
    for number, owner in enumerate(plan.owners):
        out: tuple[torch.Tensor, ...] = ()
        if owner == comm.rank and problem is None:
            of_segment[number] = received
            try:
                out = _run(run, Segment(run, plan, number, blank=math.nan), received, step)
            except RankError:
                raise
            except Exception as error:
                problem = f"it fails ({type(error).__name__}: {error})"
        problem = comm.group.broadcast_object(problem, owner)
        if problem is None and number < len(plan.cuts):
            received = [torch.empty_like(meta, device=run.device) for meta in plan.messages(number)]
            for tensor, content in zip(received, out, strict=False):
                tensor.detach().copy_(content)
            for tensor in received:
                comm.broadcast(tensor.detach(), owner)
        elif problem is None:
            got = comm.group.broadcast_object(float(out[0]) if out else None, owner)
    if problem is None and not _same(float(expected), got, expected.dtype, plan.draws):
        problem = f"the loss is {got:.7g}, not {float(expected):.7g}"
    if problem is not None:
        mine = [(number, _leaking(run, plan, number, given, step)) for number, given in of_segment.items()]
        found = sorted(one for of_rank in comm.group.gather_objects(mine) for one in of_rank if one[1])
        what = f"something made of the output of {listed(found[0][1])}" if found else "something"
        raise UnsupportedError(
            f"{run.cut.name} cannot be cut at its block calls for this loss: with placeholders for the blocks of other "
            f"stages {problem}, so {what} crosses a cut and is neither an argument nor an output of a block"
        )


def _leaking(run: LossRun, plan: LossPlan, number: int, received: list[torch.Tensor], step: StepData) -> list[str]:
    """Return the names of blocks before a segment whose outputs it reads, though they were not handed to it: another
    content of their placeholders changes its result."""

    def result(only: int) -> tuple[torch.Tensor, ...] | None:
        try:
            return _run(run, Segment(run, plan, number, math.nan, only), received, step)
        except Exception:  # of the model, for which the content is wrong
            return None

    zeros = result(-1)
    if zeros is None:
        return []
    sites = [site for site in range(plan.segments[number][0]) if not _equal(zeros, result(site))]
    return list(dict.fromkeys(run.cut.blocks[plan.sites[site].block][0] for site in sites))


def _equal(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...] | None) -> bool:
    if other is None:
        return False
    return all(torch.allclose(a, b, 0, 0, equal_nan=True) for a, b in zip(one, other, strict=True))


def _run(run: LossRun, segment: Segment, received: list[torch.Tensor], step: StepData) -> tuple[torch.Tensor, ...]:
    before, run.step = run.step, step
    try:
        with torch.enable_grad():
            out = segment(*received, index=torch.zeros(1))
    finally:
        run.step = before
    torch.clear_autocast_cache()
    return tuple(one.detach() for one in (out if isinstance(out, tuple) else (out,)))


def _same(expected: float, got: float, dtype: torch.dtype, draws: bool) -> bool:
    if not math.isfinite(expected) or not math.isfinite(got):
        return math.isfinite(expected) == math.isfinite(got)
    # In the watched call each stage drew with its own generator.
    return draws or abs(got - expected) <= CLOSE.get(dtype, 5e-2) * max(abs(expected), 1e-6)
