"""What a rank does in the survey: every model plain and over stages, in one process group, compared bit by bit."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from shardit.config import DiffusionParallelConfig
from shardit.core.comm.mesh import init_mesh
from shardit.core.modules.blocks import find_blocks
from shardit.core.modules.hints import Plan
from shardit.core.placement.assignment import Cut
from shardit.core.placement.partition import ChunkPlacement, block_cost, place_blocks
from shardit.core.stages.transformer_stages import Runtime, TransformerStages, stage
from shardit.errors import RankError, UnsupportedError
from tests.support import survey_models
from tests.support.survey_models import Draw, Entry

CALLS = ((0, False), (1, False), (2, False), (3, True), (4, True))
"""Seed and size of the calls that every model makes."""


@dataclass
class Outcome:
    """What became of one model on one rank.

    error: the first thing that was wrong, or None. refused: the message of an UnsupportedError.
    strangers: blocks of other ranks that this rank ran. ran: own blocks that it ran, of `own`.
    """

    id: str
    chunks: int
    error: str | None = None
    refused: str | None = None
    strangers: tuple[int, ...] = ()
    ran: int = 0
    own: int = 0
    hops: list[int] = field(default_factory=list)


def runtime_of(rank: int, size: int, method: str) -> Runtime:
    """The runtime of one pipeline of `size` stages."""
    mesh = init_mesh(DiffusionParallelConfig(pipeline_parallel_size=size), rank=rank, init_method=method, timeout_s=30)
    return Runtime.of(mesh, split_batch=False)


def survey(rank: int, size: int, method: str, ids: Sequence[str], chunks: Sequence[int]) -> list[Outcome]:
    """Compare the models with the given ids, for each number of chunks. Ends early when a rank is lost."""
    runtime = runtime_of(rank, size, method)
    outcomes = []
    for entry in (survey_models.entry(name) for name in ids):
        for number in chunks:
            outcome = Outcome(entry.id, number)
            outcomes.append(outcome)
            try:
                _compare(entry, runtime, number, outcome)
            except UnsupportedError as error:
                outcome.refused = str(error)
            except RankError:
                outcome.error = traceback.format_exc()
                return outcomes
            except Exception:
                outcome.error = traceback.format_exc()
    runtime.comm.flush()
    runtime.comm.group.barrier()
    return outcomes


def _compare(entry: Entry, runtime: Runtime, chunks: int, outcome: Outcome) -> None:
    model = entry.build()
    extra = {"return_dict": chunks > 1} if entry.returns else {}
    try:
        with torch.no_grad():
            plain = [model(**entry.inputs(Draw(*call)), **extra) for call in CALLS]
    finally:  # a rank on which the plain model fails must not be missed by the others
        runtime.comm.group.barrier()
    stages = staged(model, runtime, chunks, Plan(order=entry.order, replicate=entry.replicate))
    got: list[Any] = [model(**entry.inputs(Draw(*CALLS[0])), **extra)]
    got += [model(**entry.inputs(Draw(*CALLS[i])), **extra) for i in (1, 2)]  # both start before any is looked at
    late = same(plain[2], got[2])
    got += [model(**entry.inputs(Draw(*CALLS[i])), **extra) for i in (3, 4)]
    equal = [same(a, b) for a, b in zip(plain, got, strict=True)]
    record(outcome, stages)
    if not (late and all(equal)):
        raise AssertionError(f"not the same bits: calls {equal}, the later one first {late}")


def staged(model: nn.Module, runtime: Runtime, chunks: int, plan: Plan | None = None) -> TransformerStages:
    """Stage a model; looped placements get chunks of uneven size where there are blocks enough."""
    blocks = find_blocks(model, plan)
    placement = place_blocks([block_cost(block) for _, block in blocks], runtime.mesh.pp_size, chunks)
    sizes = list(placement.sizes)
    if placement.chunks > 1 and sizes[-1] > 1:
        placement = ChunkPlacement((sizes[0] + 1, *sizes[1:-1], sizes[-1] - 1), placement.pp_size)
    return stage(model, runtime, Cut((), placement, plan))


def record(outcome: Outcome, stages: TransformerStages) -> None:
    """Which blocks this rank ran."""
    rank = stages.runtime.comm.rank
    own = {i for i, owner in enumerate(stages.cut.owners) if owner == rank}
    outcome.strangers = tuple(sorted(set(stages.cut.ran) - own))
    outcome.ran, outcome.own = len(set(stages.cut.ran) & own), len(own)
    outcome.hops = [len(local.plan.hops) for local in stages.plans]


def same(expected: Any, got: Any) -> bool:
    """Whether two results have the same structure and the same bits, and nothing that is not finite."""
    a, a_spec = tree_flatten(expected)
    b, b_spec = tree_flatten(got)
    return a_spec == b_spec and all(map(_same_leaf, a, b))


def _same_leaf(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor):
        return type(a) is type(b) and bool(a == b)
    if not isinstance(b, torch.Tensor) or a.dtype != b.dtype or not bool(torch.isfinite(a).all()):
        return False
    return torch.equal(a, b)
