"""One call of a block on all tokens: the ranks share its modules by rows and its attention by heads or queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.utils._pytree import tree_unflatten

from shardit.core.comm.collectives import Collectives, even_sizes
from shardit.core.modules.patching import plain_class
from shardit.parallel.attention.hook import attention_goes_to
from shardit.parallel.attention.sequence_attention import Call
from shardit.parallel.sequence.partitioned.modules import modules_go_to, only_tensor

CHANNELS = -1
"""Stands for the dimension whose rows are partitioned, if a convolution computes its share of the output channels."""

PartitionedRows = Mapping[nn.Module, tuple[int, int]]
"""The number of dimensions of a module's argument, and that whose rows are partitioned."""


@dataclass(frozen=True)
class PartitionedBlock:
    """The operations of a kind of block that are partitioned over the ranks.

    rows: by the path of a module in the block, the number of dimensions of its argument, and that whose rows are
    partitioned (or `CHANNELS`).
    share: of the multiplications of the block, those that are partitioned.
    """

    rows: Mapping[str, tuple[int, int]]
    share: float


class PartitionedCall:
    """Runs the calls of modules (`modules.ModuleHandler`) and of attention (`hook.Handler`) of one block call."""

    def __init__(self, comm: Collectives, rows: PartitionedRows):
        self._comm, self._rows, self._inside = comm, rows, False

    def module_call(
        self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """See `modules.ModuleHandler`."""
        rows = None if self._inside else self._rows.get(module)
        found = None if rows is None else only_tensor(args, kwargs)
        if rows is None or found is None:
            return call(*args, **kwargs)
        leaves, spec, place = found
        whole, (dims, dim) = leaves[place], rows
        if dim == CHANNELS and whole.ndim == dims and is_plain_convolution(module):
            sizes = even_sizes(module.out_channels, self._comm.size)
            return gathered(some_channels(module, whole, sizes, self._comm.index), sizes, 1, self._comm)
        if dim == CHANNELS or whole.ndim != dims or whole.shape[dim] < self._comm.size:
            return call(*args, **kwargs)
        sizes = even_sizes(whole.shape[dim], self._comm.size)
        leaves[place] = part(whole, dim, sizes, self._comm.index)
        args, kwargs = tree_unflatten(leaves, spec)
        self._inside = True
        try:
            out = call(*args, **kwargs)
        finally:
            self._inside = False
        return gathered(out, sizes, dim, self._comm)

    def attend(self, call: Call) -> torch.Tensor:
        """See `hook.Handler`."""
        share = None if self._inside else attention_share(call, self._comm.size)
        if share is None:
            return call.inner(call.q, call.k, call.v, call.mask)
        out = share.run(call, self._comm.index)
        return gathered(out, share.sizes, share.dim, self._comm)


@contextmanager
def operations_go_to(run: Any) -> Iterator[None]:
    """Send the calls of modules and of attention in this context to a run."""
    with attention_goes_to(run), modules_go_to(run):
        yield


def part(tensor: torch.Tensor, dim: int, sizes: list[int], rank: int) -> torch.Tensor:
    """Return a rank's rows of a tensor, dense if the tensor is."""
    rows = tensor.narrow(dim, sum(sizes[:rank]), sizes[rank])
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
    order = sorted(range(rows.ndim), key=rows.stride, reverse=True)
    whole = comm.all_gather(rows, sizes, dim).permute(order).contiguous()
    return whole.permute([order.index(d) for d in range(rows.ndim)])


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


def multiplications(call: Call) -> int:
    """Return the number of multiplications of an attention call."""
    batch, queries, heads, width = call.q.shape
    return batch * queries * heads * call.k.shape[1] * (width + call.v.shape[3])


def rows_by_module(block: nn.Module, partitioned: PartitionedBlock) -> PartitionedRows:
    """Return the partitioned rows by module of a block."""
    modules = dict(block.named_modules())
    return {modules[path]: dims for path, dims in partitioned.rows.items()}


def splits(tensor: torch.Tensor, dim: int, size: int) -> list[torch.Tensor]:
    """Return the parts of all ranks."""
    sizes = even_sizes(tensor.shape[dim], size)
    return [part(tensor, dim, sizes, rank) for rank in range(size)]


def likely_dims(module: nn.Module, given: torch.Tensor, out: Any, size: int) -> list[int]:
    """Return the dimensions of a module's argument that could be rows of their own, the most likely first; the batch,
    which may be one sample in other calls, is the last."""
    if not isinstance(out, torch.Tensor) or out.ndim != given.ndim or given.ndim < 2:
        return []
    order = [given.ndim - 2, *range(1, given.ndim - 2), given.ndim - 1, 0]
    found = [d for d in dict.fromkeys(order) if given.shape[d] == out.shape[d] and given.shape[d] >= size]
    if is_plain_convolution(module) and given.ndim == module.weight.ndim and module.out_channels >= size:
        found.insert(len(found) - 1 if 0 in found else len(found), CHANNELS)
    return found
