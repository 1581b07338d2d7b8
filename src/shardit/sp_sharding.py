"""`sp_shard` and `sp_gather`: splitting and gathering by hand, for forwards that decide while they run what to split.

A model whose forward calls them declares `_sp_plan = {}` (or a plan with entries), which means that its author
splits it; then attention between a shard and its gather runs over the ranks, and the whole model is checked. See
docs/sequence-plans.md.

Outside of a model that was made parallel both return what they get, so that such a model next to it stays whole, unless
the program has made groups itself (`parallel_state.initialize_model_parallel`): then they cut and gather, and
attention is the program's own business.
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

    Lengths need not divide: the first ranks have one token more. The same tensor if tokens are not sharded. `x` is
    the same on all ranks. Raises InputError if `x` has no such dimension, UnsupportedError inside a model that
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

    Shards may have any lengths. The same tensor if tokens are not sharded. Inside a model they are learned once for
    each shape. Outside of one they are exchanged at every call (8 bytes), unless `total` is given, the length of what
    `sp_shard` split. Raises as `sp_shard` does, and InputError if `total` does not fit.
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
