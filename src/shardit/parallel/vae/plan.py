"""Finds the tiles of a VAE call by running it on shapes alone.

A *part* is the VAE's encoder or decoder. A *tile* is a set of dependent part calls: an output or a cache entry of one
is an argument of another. Everything else (slicing, blending, small convolutions) is *glue*.
"""

from __future__ import annotations

import copy
import hashlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from shardit.core.comm.wire import MessageLayout, dump_with_tensors, pack_layout
from shardit.core.modules.block_calls import BlockCalls
from shardit.core.modules.patching import number_copies, subclass_in_place
from shardit.core.plans.call_plan import Leaf, span_bytes
from shardit.core.runtime.flat_call import FlatCall
from shardit.parallel.vae.watch import TileWatch, Untileable

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)
"""Allowed types of arguments besides tensors and containers: a cache object of another kind could join two tiles
unnoticed."""


@dataclass(frozen=True)
class TileCall:
    """One part call: the number of its tile, its output, and the numbers of the leaves that glue reads."""

    tile: int
    spec: Any = field(compare=False)
    leaves: tuple[Leaf, ...]
    sent: tuple[int, ...]


@dataclass(frozen=True)
class TilePlan:
    """The part calls of one VAE call in order, and their ranks: owners[t] is the place of tile t's rank among those
    that share the tiles. messages[r]: one message with all results of rank r, its parts at[(call, leaf)]."""

    calls: tuple[TileCall, ...]
    owners: tuple[int, ...]
    messages: tuple[MessageLayout, ...]
    at: dict[tuple[int, int], int] = field(compare=False)

    @staticmethod
    def of(calls: Sequence[TileCall], costs: Sequence[int], ranks: int) -> TilePlan:
        """Assign the tiles to ranks, and lay out the message of each rank."""
        owners = assign_tiles(costs, ranks)
        sizes: list[list[int]] = [[] for _ in range(ranks)]
        at: dict[tuple[int, int], int] = {}
        for number, call in enumerate(calls):
            of_rank = sizes[owners[call.tile]]
            for leaf in call.sent:
                at[number, leaf] = len(of_rank)
                of_rank.append(span_bytes(call.leaves[leaf]))
        return TilePlan(tuple(calls), owners, tuple(pack_layout(tuple(s)) for s in sizes), at)

    @property
    def digest(self) -> str:
        """Return a hash of the plan for comparison between ranks."""
        return hashlib.sha256(repr((self.calls, self.owners, self.messages)).encode()).hexdigest()

    @property
    def sharded(self) -> bool:
        """Whether any rank but the first has a tile."""
        return any(self.owners)


def assign_tiles(costs: Sequence[int], ranks: int) -> tuple[int, ...]:
    """Return the rank of each tile: the largest first, to the rank with the least work; among equals the last rank,
    since the first blends. A single tile goes to the first, which then needs no message."""
    if len(costs) == 1:
        return (0,)
    load, owners = [0] * ranks, [0] * len(costs)
    for tile in sorted(range(len(costs)), key=lambda t: (-costs[t], t)):
        rank = min(range(ranks), key=lambda r: (load[r], -r))
        load[rank] += costs[tile]
        owners[tile] = rank
    return tuple(owners)


class Planner:
    """Intercepts part calls while a VAE call runs on shapes: records the calls and their dependencies."""

    def __init__(self, watch: TileWatch):
        self.watch = watch
        self.costs: list[int] = []
        self._outputs: list[tuple[Any, tuple[Leaf, ...]]] = []
        self._joined: list[int] = []  # call -> an earlier call of the same tile, or itself
        self._known: dict[Any, tuple[Any, list[Any]]] = {}

    def block_call(self, index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run instead of a part."""
        number, given = len(self._outputs), tree_leaves((args, kwargs))
        for leaf in given:
            if not isinstance(leaf, (torch.Tensor, *PLAIN)):
                raise Untileable(f"a part of it is given a {type(leaf).__name__}")
        tensors = [leaf for leaf in given if isinstance(leaf, torch.Tensor)]
        self._joined.append(number)
        for earlier in sorted(self.watch.origins.of(tensors)):
            self._joined[self._root(earlier)] = self._root(number)
        self.costs.append(tensors[0].numel() if tensors else 0)
        with self.watch.call(number):
            out = self._run(index, call, args, kwargs)
        spec_leaves = _describe(out)
        self._outputs.append(spec_leaves)
        self.watch.record_outputs(number, tree_leaves(out), tree_leaves((args, kwargs)))
        return out

    def _run(self, index: int, call: Any, args: Any, kwargs: Any) -> Any:
        """Run a part; if a similar call was run before, repeat only its outputs and caches."""
        key = (index, FlatCall.of(args, kwargs).signature(False))
        boxes = _containers((args, kwargs))
        if key not in self._known:
            out = call(*args, **kwargs)
            self._known[key] = _describe(out), [_describe(box) for box in boxes]
            return out
        described, after = self._known[key]
        for box, content in zip(boxes, after, strict=True):
            new = _build(content)
            box.clear()
            box.extend(new) if isinstance(box, list) else box.update(new)
        return _build(described)

    def _root(self, number: int) -> int:
        while self._joined[number] != number:
            number = self._joined[number]
        return number

    def plan(self, ranks: int) -> TilePlan:
        """Return the plan of the recorded calls."""
        roots = [self._root(number) for number in range(len(self._outputs))]
        tiles = {root: tile for tile, root in enumerate(dict.fromkeys(roots))}
        costs = [0] * len(tiles)
        for root, cost in zip(roots, self.costs, strict=True):
            costs[tiles[root]] += cost
        calls = [
            TileCall(tiles[root], spec, leaves, self.watch.read_of(number))
            for number, (root, (spec, leaves)) in enumerate(zip(roots, self._outputs, strict=True))
        ]
        return TilePlan.of(calls, costs, ranks)


def find_tiles(
    method: Callable[..., Any], module: nn.Module, arguments: Any, calls: BlockCalls, ranks: int
) -> TilePlan:
    """Return the plan of `method(module, *args, **kwargs)`, whose parts are called through `calls`. Computes nothing.

    Raises Untileable if tiles could not be distinguished, and any error of the method on such arguments.
    """
    with torch.inference_mode(False), torch.no_grad():
        shapes = shape_of(module)
        args, kwargs = tree_map_only(torch.Tensor, _on_meta, arguments)
        before = [_held(part) for part in shapes.modules()][1:]
        with TileWatch(t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)) as watch:
            planner = Planner(watch)
            with calls.intercepted_by(planner):
                watch.result(dump_with_tensors(method(shapes, *args, **kwargs))[1])
    after = [_held(part) for part in shapes.modules()][1:]
    if not all(len(a) == len(b) and all(map(operator.is_, a, b)) for a, b in zip(before, after, strict=True)):
        raise Untileable("a part of it keeps state from one call to the next")
    return planner.plan(ranks)


def shape_of(module: nn.Module) -> nn.Module:
    """Copy a VAE with shapes and without data. The copy blends two tiles, a loop over rows of pixels, by returning the
    second."""
    tensors = [leaf for part in module.modules() for leaf in _held(part) if isinstance(leaf, torch.Tensor)]
    copied = copy.deepcopy(module, {id(tensor): _on_meta(tensor) for tensor in tensors})
    number_copies(module, copied)
    subclass_in_place(copied, {"device": torch.device("meta")})
    for name in dir(type(module)):
        if name.startswith("blend_"):
            setattr(copied, name, lambda first, second, *_: (first.detach(), second.detach())[1])
    return copied


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta


def _held(module: nn.Module) -> list[Any]:
    """Return all objects in the attributes of a module."""
    return tree_leaves(vars(module))


def _containers(tree: Any) -> list[Any]:
    """Return the outermost lists and dicts among arguments, which a part may write to."""
    args, kwargs = tree
    return [value for value in (*args, *kwargs.values()) if isinstance(value, (list, dict))]


def _describe(value: Any) -> tuple[Any, tuple[Leaf, ...]]:
    leaves, spec = tree_flatten(value)
    return spec, tuple(_leaf(leaf) for leaf in leaves)


def _leaf(value: Any) -> Leaf:
    if not isinstance(value, torch.Tensor):
        return Leaf("value", value=value)
    dense = torch.empty_like(value).stride()  # without gaps or overlaps
    return Leaf("tensor", value.dtype, tuple(value.shape), tuple(dense))


def _build(described: tuple[Any, tuple[Leaf, ...]]) -> Any:
    spec, leaves = described
    return tree_unflatten([placeholder(leaf, "meta") for leaf in leaves], spec)


def placeholder(leaf: Leaf, device: torch.device | str, read: bool = True) -> Any:
    """Return memory of the right shape, or one expanded element if it is never read; or the value that is not a
    tensor."""
    if leaf.kind != "tensor":
        return leaf.value
    if read:
        return torch.empty_strided(leaf.size, leaf.stride, dtype=leaf.dtype, device=device)
    return torch.empty((), dtype=leaf.dtype, device=device).expand(leaf.size)
