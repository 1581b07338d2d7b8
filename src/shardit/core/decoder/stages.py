"""A decoder over stages: the calls of its blocks."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardit.core.comm.same_point import sendable
from shardit.core.decoder.link import Link
from shardit.core.decoder.shapes import Returned, leaf_of, narrowed, sizes, strides, structure
from shardit.core.decoder.stage_tensor import Memory, StageTensor, bring, look_of, stage_tensor
from shardit.core.modules.patching import subclass_in_place
from shardit.core.runtime.versions import changed, mark
from shardit.errors import RankError, UnsupportedError


class Books(Protocol):
    """Keeps what the caches among the arguments of blocks say of layers that other ranks have."""

    def enter(self, index: int, arguments: Sequence[Any], own: bool) -> None:
        """Before block number `index` is called, or would be if it was this rank's own."""
        ...


@dataclass
class Given:
    """What a block is called with. Most blocks of a forward are given the same, but for the first argument."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Any]
    spec: Any
    structure: Any
    tensors: list[int]
    staged: list[StageTensor]
    first_alone: bool
    _sizes: dict[int, Any] = field(default_factory=dict)

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        """Look at the arguments of a call."""
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [q for q, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        staged = [leaf for leaf in leaves if type(leaf) is StageTensor]
        first_alone = bool(args) and len(staged) == 1 and staged[0] is args[0]
        return Given(args, kwargs, leaves, spec, structure(leaves, spec), tensors, staged, first_alone)

    def same(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether another call is given the same, but for the data of a first argument; if so, this is that call now."""
        if not self.first_alone or len(args) != len(self.args) or len(kwargs) != len(self.kwargs):
            return False
        first, before = args[0], self.args[0]
        if type(first) is not StageTensor or first.dtype != before.dtype or first.shape != before.shape:
            return False
        own = self.kwargs
        for name, value in kwargs.items():
            if name not in own or own[name] is not value:
                return False
        if any(a is not b for a, b in zip(args[1:], self.args[1:], strict=True)):
            return False
        self.args, self.kwargs, self.leaves[0], self.staged[0] = args, kwargs, first, first
        return True

    def sizes(self, known: Returned) -> list[tuple[int, ...] | None] | None:
        """The sizes of new tensors among what a block returns, or None."""
        if id(known) not in self._sizes:
            self._sizes[id(known)] = sizes(known, self.leaves), known  # which must live as long as its id is used
        return self._sizes[id(known)][0]

    def plain(self) -> tuple[list[Any], tuple[Any, ...], dict[str, Any]]:
        """Leaves, arguments and keyword arguments on a rank that has the data of all."""
        leaves = [leaf.data_here if type(leaf) is StageTensor else leaf for leaf in self.leaves]
        if self.first_alone:
            return leaves, (leaves[0], *self.args[1:]), self.kwargs
        args, kwargs = tree_unflatten(leaves, self.spec)
        return leaves, args, kwargs


@dataclass
class DecoderStages:
    """A decoder cut at the calls of its blocks (embedding, layers, head). owners[i]: stage of block i. ran[i]: how often
    this rank ran it."""

    model: nn.Module
    link: Link
    blocks: list[tuple[str, nn.Module]]
    owners: list[int]
    books: Books
    ran: Counter[int] = field(default_factory=Counter)
    _known: dict[Any, Returned] = field(default_factory=dict)
    _inside: bool = False
    _given: Given = field(default_factory=lambda: Given.of((), {}))

    def __post_init__(self) -> None:
        self._each = [frozenset((rank,)) for rank in range(self.link.size)]
        self._me = self._each[self.link.rank]

    def install(self) -> None:
        """Intercept the calls of all blocks, at `forward`: hooks see what blocks of other ranks give, too."""
        for index, (_, block) in enumerate(self.blocks):
            own = type(block).forward
            subclass_in_place(block, {"forward": self._intercepted(index, own)})

    def _intercepted(self, index: int, own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return own(block, *args, **kwargs)
            return self.block_call(index, own.__get__(block), args, kwargs)

        return forward

    def block_call(self, index: int, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The owner runs the block, the others get stage tensors for its results."""
        owner, link = self.owners[index], self.link
        given = self._given
        if not given.same(args, kwargs):
            given = self._given = Given.of(args, kwargs)
        bring(given.staged, self._each[owner])
        self.books.enter(index, given.leaves, owner == link.rank)
        key = index, given.structure
        known = self._known.get(key)
        expected = None if known is None else given.sizes(known)
        if owner == link.rank:
            return self._own(key, call, given, known, expected)
        if expected is None:
            known, expected = self._told(key, known, owner)
        assert known is not None
        for q in known.writes:
            link.comm.broadcast(given.leaves[q], owner)
        return self._absent(known, expected, given.leaves, owner)

    def _own(
        self,
        key: Any,
        call: Callable[..., Any],
        given: Given,
        known: Returned | None,
        expected: list[tuple[int, ...] | None] | None,
    ) -> Any:
        link, index, arguments = self.link, key[0], given.leaves
        plain, own_args, own_kwargs = given.plain()
        before = [mark(plain[q]) for q in given.tensors]
        self._inside = True
        try:
            with torch.no_grad():
                out = call(*own_args, **own_kwargs)
        except Exception as error:
            if expected is None:
                link.comm.group.broadcast_object(sendable(error), link.rank)
                raise
            raise RankError(link.rank, f"{self.blocks[index][0]}: {type(error).__name__}: {error}") from error
        finally:
            self._inside = False
        self.ran[index] += 1
        writes = [q for q, marked in zip(given.tensors, before, strict=True) if changed(plain[q], marked)]
        self._written(writes, arguments)
        if known is not None and expected is not None and known.lone and type(out) is torch.Tensor and not writes:
            if tuple(out.shape) == expected[0] and out.dtype == known.leaves[0].dtype:
                return stage_tensor(look_of(out), out, Memory(self._me), link)
        leaves, out_spec = tree_flatten(out)
        if expected is None:
            found = self._describe(index, leaves, out_spec, plain, [q for q in writes if type(arguments[q]) is not StageTensor])
            link.comm.group.broadcast_object(found, link.rank)
            if isinstance(found, Exception):
                raise found
            self._learn(key, known, found)
        else:
            assert known is not None
            self._check(index, leaves, out_spec, known, expected)
        for q in writes:
            if type(arguments[q]) is not StageTensor:
                link.comm.broadcast(arguments[q], link.rank)
        places = {id(leaf): number for number, leaf in enumerate(plain) if isinstance(leaf, torch.Tensor)}
        wrapped = [
            leaf
            if not isinstance(leaf, torch.Tensor)
            else arguments[places[id(leaf)]]
            if id(leaf) in places
            else stage_tensor(look_of(leaf), leaf, Memory(self._me), link)
            for leaf in leaves
        ]
        return tree_unflatten(wrapped, out_spec)

    def _written(self, writes: list[int], arguments: list[Any]) -> None:
        if any(type(arguments[q]) is StageTensor for q in writes):
            raise UnsupportedError("a block writes into an argument that another block has given")

    def _describe(self, index: int, leaves: list[Any], spec: Any, arguments: list[Any], writes: list[int]) -> Any:
        """What all ranks learn of a result, or why they cannot."""
        name = self.blocks[index][0]
        found = []
        for leaf in leaves:
            described = leaf_of(leaf, arguments)
            if described is None:
                return UnsupportedError(f"{name} returns a {type(leaf).__name__}, which other ranks cannot know")
            if isinstance(leaf, torch.Tensor) and described.dims is not None:
                if tuple(leaf.stride()) != strides(tuple(leaf.shape), described.order) and leaf.numel():
                    return UnsupportedError(f"{name} returns a tensor with gaps: {tuple(leaf.shape)}, {leaf.stride()}")
            found.append(described)
        return Returned(spec, tuple(found), tuple(writes))

    def _told(self, key: Any, known: Returned | None, owner: int) -> tuple[Returned, list[tuple[int, ...] | None]]:
        found = self.link.comm.group.broadcast_object(None, owner)
        if isinstance(found, Exception):
            raise found
        self._learn(key, known, found)
        # Of this call the lengths are known, whatever else they might have been.
        now = [None if leaf.dims is None else tuple(_length(one) for one in leaf.dims) for leaf in found.leaves]
        return found, now

    def _learn(self, key: Any, known: Returned | None, found: Returned) -> None:
        try:
            self._known[key] = found if known is None else narrowed(known, found)
        except ValueError as error:
            raise UnsupportedError(f"{self.blocks[key[0]][0]} cannot run on one rank alone: {error}") from None

    def _check(
        self, index: int, leaves: list[Any], spec: Any, known: Returned, expected: list[tuple[int, ...] | None]
    ) -> None:
        """The other ranks go by what was learned."""
        same = spec == known.spec and len(leaves) == len(known.leaves)
        for leaf, described, size in zip(leaves, known.leaves, expected, strict=True) if same else ():
            if described.dims is None:
                same &= isinstance(leaf, torch.Tensor) or described.arg >= 0 or leaf == described.value
            else:
                same &= isinstance(leaf, torch.Tensor) and tuple(leaf.shape) == size and leaf.dtype == described.dtype
        if not same:
            raise RankError(self.link.rank, f"{self.blocks[index][0]} returns something else than in earlier calls")

    def _absent(
        self, known: Returned, expected: list[tuple[int, ...] | None], arguments: list[Any], owner: int
    ) -> Any:
        leaves, holders = [], self._each[owner]
        for leaf, size in zip(known.leaves, expected, strict=True):
            if size is None:
                leaves.append(arguments[leaf.arg] if leaf.arg >= 0 else leaf.value)
                continue
            assert leaf.dtype is not None
            look = torch.Size(size), strides(size, leaf.order), 0, leaf.dtype
            leaves.append(stage_tensor(look, None, Memory(holders), self.link))
        if known.lone:
            return leaves[0]
        return tree_unflatten(leaves, known.spec)


def _length(candidates: frozenset[Any]) -> int:
    return next(one for one in candidates if isinstance(one, int))
