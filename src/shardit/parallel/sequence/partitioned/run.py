"""One call of a block on all tokens: the ranks share its modules by rows, and its attention by heads or queries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes as without_modes

from shardit.core.comm.collectives import Collectives, even_sizes
from shardit.core.modules.patching import plain_class
from shardit.errors import UnsupportedError
from shardit.parallel.attention.hook import intercept_attention
from shardit.parallel.attention.sequence_attention import Call
from shardit.parallel.sequence.partitioned.modules import Arguments, intercept_modules
from shardit.parallel.sequence.partitioned.sums import Sums, summed

CHANNELS = -1
"""Stands for the dimension whose rows are partitioned, if a convolution computes its share of the output channels."""


@dataclass(frozen=True)
class Rows:
    """How the ranks share the calls of a module.

    dims: of each tensor among its arguments the number of dimensions and the one whose rows are partitioned, None if
    every rank takes all of it. The result is partitioned like the first. halo: rows on either side of its own that a
    rank computes, too, and drops: convolutions see neighbours. sums: operations whose results are added up.
    """

    dims: tuple[tuple[int, int | None], ...]
    halo: int = 0
    sums: Sums = field(default_factory=dict)

    @property
    def dim(self) -> int:
        """The partitioned dimension of the result."""
        return next(dim for _, dim in self.dims if dim is not None)

    def count(self, tensors: Sequence[torch.Tensor]) -> int | None:
        """Return the number of rows in a call with these tensors; None if the call is of another form."""
        if [t.ndim for t in tensors] != [ndim for ndim, _ in self.dims]:
            return None
        counts = {t.shape[dim] for t, (_, dim) in zip(tensors, self.dims, strict=True) if dim is not None}
        return counts.pop() if len(counts) == 1 else None

    def of_rank(self, tensors: Sequence[torch.Tensor], sizes: list[int], rank: int) -> list[torch.Tensor]:
        """Return the arguments for a rank's rows."""
        start = max(0, sum(sizes[:rank]) - self.halo)
        stop = min(sum(sizes), sum(sizes[: rank + 1]) + self.halo)
        cut = zip(tensors, (dim for _, dim in self.dims), strict=True)
        return [t if dim is None else _dense_rows(t, dim, start, stop - start) for t, dim in cut]

    def without_halo(self, out: torch.Tensor, sizes: list[int], rank: int) -> torch.Tensor:
        """Return a rank's own rows of its result."""
        return out.narrow(self.dim, min(self.halo, sum(sizes[:rank])), sizes[rank]) if self.halo else out


PartitionedRows = Mapping[nn.Module, Rows]


@dataclass(frozen=True)
class PartitionedBlock:
    """The operations of a kind of block that are partitioned over the ranks.

    rows: by the path of a module in the block.
    share: of the multiplications of the block, those that are partitioned.
    multiplications: of the block, in the call in which these were found.
    unless_small: why the block is refused, unless its list is small.
    """

    rows: Mapping[str, Rows]
    share: float
    multiplications: int
    unless_small: UnsupportedError | None = None


class PartitionedCall:
    """Runs the calls of modules (`modules.ModuleHandler`) and of attention (`hook.Handler`) of one block call."""

    def __init__(self, comm: Collectives, rows: PartitionedRows):
        self._comm, self._rows = comm, rows
        self._running: Rows | None = None

    def module_call(
        self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """See `modules.ModuleHandler`."""
        rows = None if self._running is not None else self._rows.get(module)
        if rows is None:
            return call(*args, **kwargs)
        given = Arguments.of(args, kwargs)
        if rows.dim == CHANNELS:
            return self._some_channels(module, call, rows, given)
        total, comm = rows.count(given.tensors), self._comm
        if total is None or total < comm.size:
            return call(*args, **kwargs)
        sizes = even_sizes(total, comm.size)
        args, kwargs = given.with_tensors(rows.of_rank(given.tensors, sizes, comm.index))
        self._running = rows
        try:
            with summed(rows.sums, comm, sizes[comm.index] / total) if rows.sums else nullcontext():
                out = call(*args, **kwargs)
        finally:
            self._running = None
        return gathered(rows.without_halo(out, sizes, comm.index), sizes, rows.dim, comm)

    def _some_channels(self, module: nn.Module, call: Callable[..., Any], rows: Rows, given: Arguments) -> Any:
        dims = [t.ndim for t in given.tensors]
        if dims != [ndim for ndim, _ in rows.dims] or not is_plain_convolution(module):
            args, kwargs = given.with_tensors(given.tensors)
            return call(*args, **kwargs)
        sizes = even_sizes(module.out_channels, self._comm.size)
        return gathered(some_channels(module, given.tensors[0], sizes, self._comm.index), sizes, 1, self._comm)

    def attend(self, call: Call) -> torch.Tensor:
        """See `hook.Handler`."""
        if self._running is not None:
            # Some attention functions cannot be traced inside.
            with without_modes() if self._running.sums else nullcontext():
                return call.inner(call.q, call.k, call.v, call.mask)
        share = attention_share(call, self._comm.size)
        if share is None:
            return call.inner(call.q, call.k, call.v, call.mask)
        out = share.run(call, self._comm.index)
        return gathered(out, share.sizes, share.dim, self._comm)


@contextmanager
def intercept_operations(run: Any) -> Iterator[None]:
    """Send the calls of modules and of attention in this context to a run."""
    with intercept_attention(run), intercept_modules(run):
        yield


def part(tensor: torch.Tensor, dim: int, sizes: list[int], rank: int) -> torch.Tensor:
    """Return a rank's rows of a tensor, dense if the tensor is."""
    return _dense_rows(tensor, dim, sum(sizes[:rank]), sizes[rank])


def _dense_rows(tensor: torch.Tensor, dim: int, start: int, length: int) -> torch.Tensor:
    rows = tensor.narrow(dim, start, length)
    return rows.contiguous() if tensor.is_contiguous() else rows


def is_plain_convolution(module: nn.Module) -> TypeGuard[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """Return whether a module computes each output channel from all input channels, with nothing added to it."""
    plain = plain_class(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and vars(module)["groups"] == 1
    return plain and not ("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def some_channels(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, given: torch.Tensor, sizes: list[int], rank: int
) -> torch.Tensor:
    """Return a rank's output channels of a convolution."""
    bias = None if module.bias is None else part(module.bias, 0, sizes, rank)
    return module._conv_forward(given, part(module.weight, 0, sizes, rank), bias)


def gathered(rows: torch.Tensor, sizes: list[int], dim: int, comm: Collectives) -> torch.Tensor:
    """Return the rows of all ranks, with the dimensions in the same order in memory as in those of this rank: code may
    view the result."""
    order = memory_order(rows, dim)
    whole = comm.all_gather(rows, sizes, dim).permute(order).contiguous()
    return whole.permute([order.index(d) for d in range(rows.ndim)])


def memory_order(rows: torch.Tensor, dim: int) -> list[int]:
    """Return the dimensions of a tensor from the outermost in memory to the innermost, as they are if `dim` gets more
    rows. A single row may have any stride; then `dim` comes before the dimensions that follow it."""
    order = sorted(range(rows.ndim), key=rows.stride, reverse=True)
    inner = order[order.index(dim) + 1 :]
    if rows.shape[dim] == 1 and rows.stride(dim) != math.prod(rows.shape[d] for d in inner):
        order.remove(dim)
        order.insert(next((n for n, d in enumerate(order) if d > dim), len(order)), dim)
    return order


@dataclass(frozen=True)
class AttentionShare:
    """The share of each rank in an attention call: `sizes` heads (dim 2) or queries (dim 1). k_sizes: key heads."""

    dim: int
    sizes: list[int]
    k_sizes: list[int]

    def run(self, call: Call, rank: int) -> torch.Tensor:
        """Return the output for the rank's share."""
        q = part(call.q, self.dim, self.sizes, rank)
        mask = call.mask
        if self.dim == 1:
            if mask is not None and mask.ndim > 1 and mask.shape[-2] != 1:
                mask = part(mask, mask.ndim - 2, self.sizes, rank)
            return call.inner(q, call.k, call.v, mask)
        if isinstance(mask, torch.Tensor) and mask.ndim > 2 and mask.shape[-3] != 1:
            mask = part(mask, mask.ndim - 3, self.sizes, rank)
        k, v = (part(t, 2, self.k_sizes, rank) for t in (call.k, call.v))
        return call.inner(q, k, v, mask)


def attention_share(call: Call, size: int) -> AttentionShare | None:
    """Return how an attention call is partitioned over the ranks, None if every rank computes all of it."""
    q_heads, k_heads, mask = call.q.shape[2], call.k.shape[2], call.mask  # the mask may be an object of the function
    plain = mask is None or isinstance(mask, torch.Tensor)
    if k_heads >= size and (mask is None or plain or mask.shape[1] == 1):
        k_sizes = even_sizes(k_heads, size)
        return AttentionShare(2, [n * (q_heads // k_heads) for n in k_sizes], k_sizes)
    if plain and not call.causal and call.not_ring is None and call.q.shape[1] >= size:
        return AttentionShare(1, even_sizes(call.q.shape[1], size), [])
    return None


def rows_by_module(block: nn.Module, partitioned: PartitionedBlock) -> PartitionedRows:
    """Return the partitioned rows by module of a block."""
    modules = dict(block.named_modules())
    return {modules[path]: rows for path, rows in partitioned.rows.items()}
