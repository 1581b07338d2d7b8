"""Tensors whose data some stages have: code outside blocks computes with them on every rank, with data where it is.

All ranks run the same operations in the same order, so each knows which rank has which tensor. An operation runs with
data on the ranks that have all of its operands, and on meta elsewhere. Data moves when an operation would otherwise run
nowhere, when Python reads a value, and when small integers result, such as sampled tokens: all ranks get those at once.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from shardit.core.decoder.link import Link
from shardit.core.runtime.randomness import States, moved, set_states, states

SMALL = 4096
"""Elements of the largest integer results that all ranks get at once."""

_copies = itertools.count(1)


@dataclass(eq=False)
class Memory:
    """A storage: the ranks that have it, and the tensors of which further ranks have copies."""

    holders: frozenset[int]
    copied: weakref.WeakSet[StageTensor] = field(default_factory=weakref.WeakSet)


class StageTensor(torch.Tensor):
    """A tensor whose data the ranks of `holders` have.

    data: the tensor itself where this rank has it, else one on meta.
    """

    data_here: torch.Tensor
    memory: Memory
    link: Link
    copy_ranks: frozenset[int]
    copy: int

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def of(tensor: torch.Tensor, memory: Memory, link: Link) -> StageTensor:
        """A stage tensor over a tensor of this rank, or over one on meta."""
        out: Any = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            StageTensor,
            tensor.shape,
            strides=tensor.stride(),
            storage_offset=tensor.storage_offset(),
            dtype=tensor.dtype,
            device=link.device,
        )
        out.data_here, out.memory, out.link, out.copy_ranks, out.copy = tensor, memory, link, frozenset(), 0
        return out

    @property
    def holders(self) -> frozenset[int]:
        """The ranks that have the data."""
        return self.memory.holders | self.copy_ranks if self.copy_ranks else self.memory.holders

    def bring(self, ranks: Iterable[int]) -> None:
        """Let more ranks have the data. Every rank calls this; the first one that has the data sends it."""
        holders = self.holders
        missing = frozenset(ranks) - holders
        if not missing:
            return
        source = min(holders)
        if self.link.rank == source:
            self.link.send(self.data_here, missing)
        elif self.link.rank in missing:
            self.data_here = self.link.receive(self.data_here, source)
        self.copy = self.copy or next(_copies)
        self.copy_ranks |= missing
        self.memory.copied.add(self)

    def written_by(self, ranks: frozenset[int]) -> None:
        """Some ranks have written to the memory: those alone have what it holds now."""
        here = self.link.rank
        for other in list(self.memory.copied):
            kept = other.copy_ranks & ranks if other.copy == self.copy else frozenset[int]()
            if here in other.copy_ranks - kept and here not in self.memory.holders:
                other.data_here = on_meta(other.data_here)
            other.copy_ranks = kept
        self.memory.holders &= ranks
        if here not in self.holders:
            self.data_here = on_meta(self.data_here)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape and strides without data."""
    if tensor.is_meta:
        return tensor
    if tensor.storage_offset():
        base = torch.empty(0, dtype=tensor.dtype, device="meta")
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        base = torch.empty(size, dtype=tensor.dtype, device="meta")
        return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@dataclass(frozen=True)
class _Kind:
    """What an operation does. writes: names and numbers of the arguments that it writes to; view: whether its result
    shares memory with its first argument."""

    writes: tuple[int | str, ...]
    view: bool
    reads_values: bool
    draws: bool
    without_data: bool


@functools.cache
def _kind(func: Any) -> _Kind:
    schema = func._schema
    writes: list[int | str] = []
    for number, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            writes.append(argument.name if argument.kwarg_only else number)
    view = not writes and any(one.alias_info is not None for one in schema.returns)
    reads = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
    draws = torch.Tag.nondeterministic_seeded in func.tags
    name = func._overloadpacket.__name__
    fresh = name.startswith("new_") or (name.endswith("_like") and name != "expand_like")
    return _Kind(tuple(writes), view, reads, draws, fresh)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    kind = _kind(func)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    staged: list[StageTensor] = [tensor for tensor in tensors if type(tensor) is StageTensor]
    link = staged[0].link
    if kind.without_data:
        return func(*tree_map(_example, args), **kwargs)
    written = [args[w] if isinstance(w, int) else kwargs.get(w) for w in kind.writes if not isinstance(w, int) or w < len(args)]
    if kind.reads_values or any(type(one) is not StageTensor for one in tree_leaves(written)):
        for tensor in staged:
            tensor.bring(link.everyone)
        out = func(*tree_map(_data, args), **tree_map(_data, kwargs))
        for one in tree_leaves(written):
            if type(one) is StageTensor:
                one.written_by(link.everyone)
        return written[0] if len(written) == 1 else out
    ranks = _ranks(staged)
    if link.rank in ranks:
        before: States = states(link.device, []) if kind.draws else {}
        out = func(*tree_map(_data, args), **tree_map(_data, kwargs))
    else:
        before = {}
        meta_args, meta_kwargs = tree_map(_as_meta, (args, kwargs))
        out = func(*meta_args, **meta_kwargs)
    if kind.draws:
        _same_generators(link, ranks, before)
    if written:
        for one in written:
            one.written_by(ranks)
        return written[0] if len(written) == 1 else tuple(written)
    return _wrapped(out, kind, staged[0], ranks, link)


def _ranks(staged: Sequence[StageTensor]) -> frozenset[int]:
    """The ranks that run an operation: those that have all operands; if there are none, the last of their first
    holders gets them."""
    ranks = staged[0].holders
    for tensor in staged[1:]:
        ranks = ranks & tensor.holders
    if not ranks:
        target = max(min(tensor.holders) for tensor in staged)
        for tensor in staged:
            tensor.bring((target,))
        ranks = frozenset((target,))
    return ranks


def _wrapped(out: Any, kind: _Kind, base: StageTensor, ranks: frozenset[int], link: Link) -> Any:
    def wrap(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor):
            return tensor
        if kind.view:
            view = StageTensor.of(tensor, base.memory, link)
            if base.copy_ranks:
                view.copy_ranks, view.copy = base.copy_ranks, base.copy
                base.memory.copied.add(view)
            return view
        if not tensor.is_floating_point() and tensor.numel() <= SMALL:
            return shared(tensor, ranks, link)
        return StageTensor.of(tensor, Memory(ranks), link)

    return wrap(out) if isinstance(out, torch.Tensor) else tree_map(wrap, out)


def shared(tensor: torch.Tensor, ranks: frozenset[int], link: Link) -> torch.Tensor:
    """A small tensor that some ranks have, for all of them; pending on the others."""
    if len(ranks) == link.size:
        return tensor
    source = min(ranks)
    if link.rank == source:
        link.send(tensor, link.everyone - ranks, later=True)
    return tensor if link.rank in ranks else link.receive_later(tensor, source)


def _same_generators(link: Link, ranks: frozenset[int], before: States) -> None:
    """After an operation that draws: the global generators of all ranks move as those of the ranks that ran it."""
    if len(ranks) == link.size:
        return
    if link.rank == min(ranks):
        news = moved(before, states(link.device, []))
        link.comm.group.broadcast_object(news, link.rank)
    else:
        news = link.comm.group.broadcast_object(None, min(ranks))
        if link.rank not in ranks:
            set_states(news, link.device, [])


def settled(tree: Any) -> Any:
    """Nested containers with plain tensors for stage tensors: all ranks get their data."""

    def plain(leaf: Any) -> Any:
        if type(leaf) is StageTensor:
            leaf.bring(leaf.link.everyone)
            return leaf.data_here
        return leaf

    return tree_map(plain, tree)


def _data(leaf: Any) -> Any:
    return leaf.data_here if type(leaf) is StageTensor else leaf


def _example(leaf: Any) -> Any:
    """A tensor of the same kind on the device, whose values do not matter."""
    if type(leaf) is not StageTensor:
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.link.device)


def _as_meta(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return on_meta(_data(leaf))
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf
