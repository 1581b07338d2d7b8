"""A decoder over stages: the calls of its blocks."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardit.core.comm.barrier import sendable
from shardit.core.decoder.block_arguments import BlockArguments, of_kind
from shardit.core.decoder.shapes import Layouts, Returned, describe, fits, narrowed, without_gaps
from shardit.core.decoder.stage_tensor import Memory, StageTensor, bring, layout_of, stage_tensor
from shardit.core.decoder.tensor_exchange import TensorExchange
from shardit.core.modules.patching import subclass_in_place
from shardit.core.runtime.versions import changed, mark
from shardit.errors import RankError, UnsupportedError


class CacheTracker(Protocol):
    """Updates caches among the arguments of blocks for layers of other ranks."""

    def among(self, arguments: Sequence[Any]) -> list[Any]:
        """Return the caches among the arguments of a block."""
        ...

    def before_call(self, caches: Sequence[Any], arguments: Sequence[Any]) -> None:
        """Prepare a call of a block, on every rank."""
        ...

    def advance(self, key: Any, caches: Sequence[Any], arguments: Sequence[Any]) -> None:
        """Update the caches after a call of a block of another rank, as its owner does. key: see `add_slots`."""
        ...

    def snapshot(self, arguments: Sequence[Any]) -> Any:
        """Return a record for `changes`, on the owner, before the first call of a structure."""
        ...

    def changes(self, name: str, before: Any) -> tuple[int, ...]:
        """Return the cache layers that the block called `name` has updated, on the owner, after that call. Raises
        UnsupportedError if it keeps other state that other ranks would need."""
        ...

    def add_slots(self, key: Any, slots: tuple[int, ...]) -> None:
        """Record the cache layers that a block updates in calls of a structure, on every rank. key: the number of the
        block, the structure."""
        ...

    def end_call(self) -> None:
        """Finish a call of the model, on every rank."""
        ...


class Collector(Protocol):
    """Collects outputs inside of blocks, besides what these return: attention weights, say."""

    def names(self) -> tuple[str, ...]:
        """Return the names of the outputs that the present call of the model collects; often none."""
        ...

    def apart(self, call: Callable[..., Any]) -> Callable[..., tuple[Any, dict[str, list[Any]]]]:
        """Return a function that calls a block and returns its result and the outputs collected in it, which are not
        yet among those of the model."""
        ...

    def add(self, found: dict[str, list[Any]]) -> None:
        """Add the outputs collected in a block to those of the model, on every rank."""
        ...


@dataclass
class DecoderStages:
    """A decoder cut at the calls of its blocks (embedding, layers, head).

    owners[i]: stage of block i. ran[i]: how often this rank ran it. _structures: numbers of those of arguments. _known:
    results by block and structure; equal ones are one object, `_results`. _storing: blocks that store keys in mappings,
    whose lengths follow no argument, so they are sent each time. Calls of blocks run without gradients.
    """

    model: nn.Module
    exchange: TensorExchange
    blocks: list[tuple[str, nn.Module]]
    owners: list[int]
    caches: CacheTracker
    collector: Collector
    ran: Counter[int] = field(default_factory=Counter)
    _structures: dict[Any, int] = field(default_factory=dict)
    _known: dict[Any, Returned] = field(default_factory=dict)
    _results: dict[Returned, Returned] = field(default_factory=dict)
    _storing: set[int] = field(default_factory=set)
    _inside: bool = False
    _arguments: BlockArguments | None = None

    def __post_init__(self) -> None:
        self._each = [frozenset((rank,)) for rank in range(self.exchange.size)]

    def install(self) -> None:
        """Intercept the calls of all blocks, at `forward`: hooks see what blocks of other ranks give, too."""
        for index, (_, block) in enumerate(self.blocks):
            subclass_in_place(block, {"forward": self._intercepted(index, type(block).forward)})

    def end_call(self) -> None:
        """Release the arguments of blocks at the end of a call of the model, as caches and masks may be large."""
        self.caches.end_call()
        self._arguments = None

    def _intercepted(self, index: int, own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return own(block, *args, **kwargs)
            return self.block_call(index, own.__get__(block), args, kwargs)

        return forward

    def block_call(self, index: int, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block on its owner; the others get stage tensors for its results."""
        owner, exchange = self.owners[index], self.exchange
        arguments = None if self._arguments is None else self._arguments.next(args, kwargs)
        if arguments is None:
            arguments = BlockArguments.of(args, kwargs, self._mode(index), self._structures, self.caches.among)
        self._arguments = arguments
        bring(arguments.staged, self._each[owner])
        self.caches.before_call(arguments.caches, arguments.leaves)
        key, names = (index, arguments.structure), self.collector.names()
        if names:
            key, call = (*key, names), self.collector.apart(call)
        known = self._known.get(key)
        expected = None if known is None or index in self._storing else arguments.layouts(known)
        if owner == exchange.rank:
            out = self._own(key, call, arguments, known, expected)
        else:
            if known is None or expected is None:
                known, expected = self._learn_from_owner(key, known, owner)
            self.caches.advance(key, arguments.caches, arguments.leaves)
            for q in known.writes:
                exchange.comm.broadcast(arguments.leaves[q], owner)
            out = self._absent(known, expected, arguments.leaves, owner)
        if arguments.mappings:
            out, written = out
            for mapping, entries in zip(arguments.mappings, written, strict=True):
                mapping.update(entries)
            if any(written):
                self._storing.add(index)
        if names:
            out, collected = out
            self.collector.add(collected)
        return out

    def _mode(self, index: int) -> Any:
        """Return the values, apart from arguments, that determine the dtypes of a block's results."""
        kind = self.exchange.device.type
        dtype = next((parameter.dtype for parameter in self.blocks[index][1].parameters()), None)
        return dtype, torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)

    def _own(
        self, key: Any, call: Callable[..., Any], arguments: BlockArguments, known: Returned | None, expected: Layouts
    ) -> Any:
        exchange, index, first = self.exchange, key[0], known is None or expected is None
        plain, args, kwargs = arguments.with_data()
        before = [mark(plain[q]) for q in arguments.tensors]
        cached = self.caches.snapshot(plain) if first else None
        held: list[dict[Any, Any]] = []
        if arguments.mappings:
            args, kwargs, held = of_kind(args, kwargs, arguments.mappings)
        self._inside = True
        try:
            with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
                out = call(*args, **kwargs)
            if arguments.mappings:
                out = out, arguments.written(args, kwargs, held)
        except Exception as error:
            if first:
                exchange.comm.group.broadcast_object(sendable(error), exchange.rank)
                raise
            raise RankError(exchange.rank, f"{self.blocks[index][0]}: {type(error).__name__}: {error}") from error
        finally:
            self._inside = False
        self.ran[index] += 1
        writes = tuple(q for q, marked in zip(arguments.tensors, before, strict=True) if changed(plain[q], marked))
        fitting = not first and fits(out, writes, known, expected)
        if not fitting:
            out = without_gaps(out, plain)
        if first:
            self._share_result(key, known, out, plain, arguments, writes, cached)
        elif not fitting and not fits(out, writes, known, expected):
            raise RankError(exchange.rank, f"{self.blocks[index][0]} returns something else than in earlier calls")
        for q in writes:
            exchange.comm.broadcast(plain[q], exchange.rank)
        if type(out) is torch.Tensor and known is not None and known.single:
            return stage_tensor(layout_of(out), out, Memory(self._each[exchange.rank]), exchange)
        return self._wrapped(out, plain, arguments.leaves)

    def _wrapped(self, out: Any, plain: list[Any], arguments: list[Any]) -> Any:
        """Return the result of an own block, with a stage tensor for each new tensor, and the arguments that it hands
        back."""
        places = {id(leaf): number for number, leaf in enumerate(plain) if isinstance(leaf, torch.Tensor)}
        leaves, spec = tree_flatten(out)
        for number, leaf in enumerate(leaves):
            if id(leaf) in places:
                leaves[number] = arguments[places[id(leaf)]]
            elif isinstance(leaf, torch.Tensor):
                leaves[number] = stage_tensor(
                    layout_of(leaf), leaf, Memory(self._each[self.exchange.rank]), self.exchange
                )
        return tree_unflatten(leaves, spec)

    def _absent(self, known: Returned, expected: Layouts, arguments: list[Any], owner: int) -> Any:
        """Return the result of a block of another rank."""
        assert expected is not None
        leaves: list[Any] = [
            stage_tensor(layout, None, Memory(self._each[owner]), self.exchange)
            if layout is not None
            else (arguments[leaf.arg] if leaf.arg >= 0 else leaf.value)
            for leaf, layout in zip(known.leaves, expected, strict=True)
        ]
        return leaves[0] if known.single else tree_unflatten(leaves, known.spec)

    def _share_result(
        self,
        key: Any,
        known: Returned | None,
        out: Any,
        plain: list[Any],
        arguments: BlockArguments,
        writes: tuple[int, ...],
        cached: Any,
    ) -> None:
        """Send the structure of a block's result to all ranks, on the owner, in the first calls of a structure."""
        name = self.blocks[key[0]][0]
        try:
            if any(type(arguments.leaves[q]) is StageTensor for q in writes):
                raise UnsupportedError(f"{name} writes into an argument that another block has given")
            found: Any = describe(name, out, plain, writes)
            slots = self.caches.changes(name, cached)
        except UnsupportedError as error:
            self.exchange.comm.group.broadcast_object(error, self.exchange.rank)
            raise
        self.exchange.comm.group.broadcast_object((found, slots), self.exchange.rank)
        self._remember(key, known, found, slots)

    def _learn_from_owner(self, key: Any, known: Returned | None, owner: int) -> tuple[Returned, Layouts]:
        received = self.exchange.comm.group.broadcast_object(None, owner)
        if isinstance(received, Exception):
            raise received
        found, slots = received
        self._remember(key, known, found, slots)
        return found, found.own_layouts()

    def _remember(self, key: Any, known: Returned | None, found: Returned, slots: tuple[int, ...]) -> None:
        self.caches.add_slots(key, slots)
        try:
            result = found if known is None else narrowed(known, found)
            self._known[key] = self._results.setdefault(result, result)
        except ValueError as error:
            raise UnsupportedError(f"{self.blocks[key[0]][0]} cannot run on one rank alone: {error}") from None
