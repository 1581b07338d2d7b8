"""`sp_shard` and `sp_gather`: splitting and gathering by hand, for forwards that choose the tensors while they run.

A model whose forward calls them declares `_sp_plan = {}`, or a plan with entries. Then attention between a shard and
its gather runs over the ranks, and the whole model is checked. See docs/sequence-plans.md.

Outside of a parallel model both return their argument, so that other models stay whole. If the program has made groups
itself (`parallel_state.initialize_model_parallel`), they cut and gather there, too; attention is up to the program.
"""

from __future__ import annotations

import torch

from shardit.core.comm.collectives import Collectives, even_sizes
from shardit.errors import InputError, UnsupportedError
from shardit.parallel.sequence.declared.model import running_pass
from shardit.parallel.sequence.declared.passes import Pass
from shardit.parallel.sequence.declared.rules import Rule
from shardit.parallel.sequence.found.model import automatic
from shardit.parallel_state import own_mesh

_alone: list[Collectives] = []


def sp_shard(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Return this rank's part of `x` along `dim`: neighbouring tokens, in the order of the ranks.

    `x` must be the same on all ranks. Its length need not divide: the first ranks have one token more. If tokens are
    not sharded, the result is `x`. Raises InputError if `x` has no such dimension, UnsupportedError inside a model that
    declares no plan.
    """
    how = _pass("sp_shard", x, dim)
    if how is not None:
        return how.split(Rule("sp_shard", dim), x)
    comm = _comm()
    if comm is None:
        return x
    sizes = even_sizes(x.shape[dim], comm.size)
    return x.narrow(dim, sum(sizes[: comm.index]), sizes[comm.index])


def sp_gather(x: torch.Tensor, dim: int, total: int | None = None) -> torch.Tensor:
    """Return the shards of all ranks, one after the other along `dim`: undoes `sp_shard`. Collective.

    Shards may have any lengths. Inside a model these are learned once for each shape. Outside they are exchanged at
    every call (8 bytes), unless `total` is given, the length before `sp_shard`. If tokens are not sharded, the result
    is `x`. Raises the errors of `sp_shard`, and InputError if `total` does not fit.
    """
    how = _pass("sp_gather", x, dim)
    if how is not None:
        return how.gather(Rule("sp_gather", dim), x)
    comm = _comm()
    if comm is None:
        return x
    if total is not None:
        sizes = even_sizes(total, comm.size)
        if x.shape[dim] != sizes[comm.index]:
            raise InputError(f"sp_gather: {x.shape[dim]} tokens are not this rank's part of total={total}")
    else:
        here = torch.tensor([x.shape[dim]], device=x.device)
        sizes = comm.all_gather(here, [1] * comm.size, 0).tolist()
    return comm.all_gather(x, sizes, dim)


def _pass(name: str, x: torch.Tensor, dim: int) -> Pass | None:
    if not -x.ndim <= dim < x.ndim:
        raise InputError(f"{name}: dim={dim} does not exist in a tensor of {x.ndim} dimensions")
    if automatic():
        raise UnsupportedError(
            f"{name} inside a model whose tokens are split without being asked: declare `_sp_plan = {{}}` on its class"
        )
    return running_pass()


def _comm() -> Collectives | None:
    """Return the sequence ranks, if there are several."""
    mesh = own_mesh()
    if mesh is None or "sp" not in mesh.axes:
        return None
    if not _alone or _alone[0].group is not mesh.axes["sp"]:
        _alone[:] = [Collectives(mesh.axes["sp"])]
    return _alone[0]
