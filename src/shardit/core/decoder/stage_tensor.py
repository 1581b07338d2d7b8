"""Tensors whose data some stages have: code outside blocks computes with them on every rank, with data where it is.

All ranks run the same operations in the same order, so each knows which ranks have which tensor. An operation runs with
data on the ranks that have all of its operands; the others know the shapes of its results. Data moves when an operation
would otherwise run nowhere, when Python reads a value, and when small integers result, such as sampled tokens: all
ranks get those at once.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from shardit.core.decoder.tensor_exchange import TensorExchange

SMALL = 4096
"""Elements of the largest integer results that all ranks get at once."""

_copies = itertools.count(1)


@dataclass(eq=False)
class Memory:
    """A storage: the ranks that have it, and by their ids the tensors of which further ranks have copies, if any."""

    holders: frozenset[int]
    _copied: weakref.WeakValueDictionary[int, StageTensor] | None = None

    def add_copied(self, tensor: StageTensor) -> None:
        """Record a tensor of which further ranks have copies."""
        if self._copied is None:
            self._copied = weakref.WeakValueDictionary()
        self._copied[id(tensor)] = tensor

    def copied(self) -> list[StageTensor]:
        """Return the tensors of which further ranks have copies."""
        return [] if self._copied is None else list(self._copied.values())


class StageTensor(torch.Tensor):
    """A tensor of which some ranks have the data.

    data_here: the tensor itself if this rank has it, else None. copy_ranks: the ranks that have a copy of this
    tensor without its storage; copy: the number of that copy, which views of it share.
    """

    data_here: torch.Tensor | None
    memory: Memory
    exchange: TensorExchange
    copy_ranks: frozenset[int] = frozenset()
    copy: int = 0

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @property
    def holders(self) -> frozenset[int]:
        """The ranks that have the data."""
        return self.memory.holders | self.copy_ranks if self.copy_ranks else self.memory.holders

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


Layout = tuple[torch.Size, tuple[int, ...], int, torch.dtype]
"""Size, strides, offset in the storage and dtype of a tensor."""


def layout_of(tensor: torch.Tensor) -> Layout:
    """Return shape, strides, offset and dtype of a tensor."""
    return tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype


def stage_tensor(layout: Layout, data: torch.Tensor | None, memory: Memory, exchange: TensorExchange) -> StageTensor:
    """Return a stage tensor over a tensor of this rank, or over nothing."""
    size, strides, offset, dtype = layout
    out: Any = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
        StageTensor, size, strides=strides, storage_offset=offset, dtype=dtype, device=exchange.device
    )
    out.data_here, out.memory, out.exchange = data, memory, exchange
    return out


def bring(tensors: Sequence[StageTensor], ranks: frozenset[int]) -> None:
    """Let more ranks have the data. Every rank calls this; of the ranks that have a tensor the first sends it."""
    if all(ranks <= tensor.memory.holders for tensor in tensors):  # nearly always
        return
    moving = [(tensor, missing) for tensor in dict.fromkeys(tensors) if (missing := ranks - tensor.holders)]
    if not moving:
        return
    exchange = moving[0][0].exchange
    data = exchange.move([(_or_meta(tensor), min(tensor.holders), missing) for tensor, missing in moving])
    for (tensor, missing), here in zip(moving, data, strict=True):
        tensor.data_here = None if here.is_meta else here
        tensor.copy = tensor.copy or next(_copies)
        tensor.copy_ranks |= missing
        tensor.memory.add_copied(tensor)


def written(tensor: StageTensor, ranks: frozenset[int]) -> None:
    """Some ranks have written to the memory of a tensor: they alone have what it holds now."""
    here = tensor.exchange.rank
    for other in [tensor, *tensor.memory.copied()]:
        other.copy_ranks = other.copy_ranks & ranks if other.copy == tensor.copy else frozenset()
    tensor.memory.holders &= ranks
    for other in [tensor, *tensor.memory.copied()]:
        if here not in other.holders:
            other.data_here = None


def materialized(tree: Any) -> Any:
    """Nested containers with plain tensors for stage tensors: all ranks get their data."""
    staged = [leaf for leaf in tree_leaves(tree) if type(leaf) is StageTensor]
    if not staged:
        return tree
    bring(staged, staged[0].exchange.everyone)
    return tree_map(_data, tree)


def mapped(function: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    """Apply a function that keeps shape and dtype: it runs on the ranks that have the data."""
    if type(tensor) is not StageTensor:
        return function(tensor)
    data = None if tensor.data_here is None else function(tensor.data_here)
    layout = layout_of(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
    return stage_tensor(layout, data, Memory(tensor.holders), tensor.exchange)


def held_as(like: StageTensor, made: torch.Tensor) -> StageTensor:
    """A tensor that all ranks have, for use on the ranks that own the memory of another one."""
    ranks, exchange = like.memory.holders, like.exchange
    return stage_tensor(layout_of(made), made if exchange.rank in ranks else None, Memory(ranks), exchange)


@dataclass(frozen=True)
class _Kind:
    """Effects of an operation. writes: names and numbers of the arguments that it writes to; view: whether its result
    shares memory with its first argument; without_data: whether only the shapes of its operands matter."""

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
    fresh = name.startswith("new_") or name.endswith("_like")
    return _Kind(tuple(writes), view, reads, draws, fresh)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    kind = _kind(func)
    staged = _staged((*args, *kwargs.values()))
    exchange = staged[0].exchange
    if kind.without_data:
        return func(*_each(_example, args), **kwargs)
    changed = [args[w] if isinstance(w, int) else kwargs[w] for w in kind.writes if w in kwargs or isinstance(w, int)]
    if kind.reads_values or (changed and len(_staged(changed)) < len(tree_leaves(changed))):
        bring(staged, exchange.everyone)
        out = _with_data(func, args, kwargs)
        for leaf in _staged(changed):
            written(leaf, exchange.everyone)
        return _result(changed) if changed else out
    ranks = _ranks(staged)
    if kind.draws:
        out = _drawn(func, args, kwargs, ranks, exchange)
    elif exchange.rank in ranks:
        out = _with_data(func, args, kwargs)
    elif changed:
        out = None
    else:
        out = _shapes(func, args, kwargs)
    for leaf in _staged(changed):
        written(leaf, ranks)
    return _result(changed) if changed else _wrapped(out, kind, staged[0], ranks, exchange)


def _staged(values: Iterable[Any]) -> list[StageTensor]:
    """Return the stage tensors among values and in lists of values: what operations take has no deeper containers."""
    leaves = (leaf for value in values for leaf in (value if type(value) in (list, tuple) else (value,)))
    return [leaf for leaf in leaves if type(leaf) is StageTensor]


def _each(function: Callable[[Any], Any], values: Iterable[Any]) -> list[Any]:
    """Apply a function to values and in lists of values. Pytree does so, too, but takes longer than most operations."""
    return [[*map(function, one)] if type(one) in (list, tuple) else function(one) for one in values]


def _with_data(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*_each(_data, args), **dict(zip(kwargs, _each(_data, kwargs.values()), strict=True)))


def _result(changed: list[Any]) -> Any:
    return changed[0] if len(changed) == 1 else tuple(changed)


def _ranks(staged: Sequence[StageTensor]) -> frozenset[int]:
    """Return the ranks that run an operation: those that have all operands; if there are none, the last of their first
    holders gets them."""
    ranks = staged[0].holders
    for tensor in staged[1:]:
        ranks = ranks & tensor.holders
    if not ranks:
        ranks = frozenset((max(min(tensor.holders) for tensor in staged),))
        bring(staged, ranks)
    return ranks


def _wrapped(out: Any, kind: _Kind, base: StageTensor, ranks: frozenset[int], exchange: TensorExchange) -> Any:
    def wrap(made: Any) -> Any:
        if not isinstance(made, (torch.Tensor, _Shape)):
            return made
        layout, data = (made.layout, None) if isinstance(made, _Shape) else (layout_of(made), made)
        if kind.view:
            view = stage_tensor(layout, data, base.memory, exchange)
            if base.copy_ranks:
                view.copy_ranks, view.copy = base.copy_ranks, base.copy
                base.memory.add_copied(view)
            return view
        if not layout[3].is_floating_point and layout[0].numel() <= SMALL:
            return (
                data if len(ranks) == exchange.size else exchange.share(_meta(layout) if data is None else data, ranks)
            )
        return stage_tensor(layout, data, Memory(ranks), exchange)

    return wrap(out) if isinstance(out, (torch.Tensor, _Shape)) else tree_map(wrap, out)


def _drawn(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], ranks: frozenset[int], exchange: TensorExchange
) -> Any:
    """Return the result of an operation that draws. The generator that it draws from moves on all ranks as on those
    that run it."""
    generator = kwargs.get("generator") or global_generator(exchange.device)
    if exchange.rank in ranks:
        out = _with_data(func, args, kwargs)
    else:
        out = _shapes(func, args, {name: value for name, value in kwargs.items() if name != "generator"})
    if len(ranks) < exchange.size:
        state = generator.get_state()
        shared = exchange.share(state if exchange.rank in ranks else state.to("meta"), ranks)
        if exchange.rank not in ranks:
            generator.set_state(shared.clone().cpu())
    return out


def global_generator(device: torch.device) -> torch.Generator:
    """Torch's own generator of a device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator


@dataclass(frozen=True)
class _Shape:
    """A tensor of a result that this rank does not have."""

    layout: Layout


_known_shapes: dict[Any, Any] = {}


def _shapes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the result of an operation with a `_Shape` for each tensor. Meta kernels find it, once for operands of a
    layout: many are Python code and take ten times as long as the operation itself."""
    key = (func, _key(args), _key(tuple(kwargs.items())))
    try:
        return _known_shapes[key]
    except (KeyError, TypeError) as error:
        meta_args, meta_kwargs = tree_map(_as_meta, (args, kwargs))
        out = func(*meta_args, **meta_kwargs)
        out = tree_map(lambda leaf: _Shape(layout_of(leaf)) if isinstance(leaf, torch.Tensor) else leaf, out)
        if isinstance(error, KeyError):
            if len(_known_shapes) >= MAX_SHAPES:
                _known_shapes.clear()
            _known_shapes[key] = out
        return out


MAX_SHAPES = 4096
"""Results whose shapes are remembered."""


def _key(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(
        layout_of(value)
        if isinstance(value, torch.Tensor)
        else _key(value)
        if isinstance(value, (list, tuple))
        else (type(value), value)
        for value in values
    )


def _data(leaf: Any) -> Any:
    return leaf.data_here if type(leaf) is StageTensor else leaf


def _or_meta(tensor: StageTensor) -> torch.Tensor:
    return _meta(layout_of(tensor)) if tensor.data_here is None else tensor.data_here


def _example(leaf: Any) -> Any:
    """Return a tensor of the same kind on the device, whose values do not matter."""
    if type(leaf) is not StageTensor:
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.exchange.device)


def _as_meta(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf if leaf.is_meta else _meta(layout_of(leaf))
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf


def _meta(layout: Layout) -> torch.Tensor:
    size, strides, offset, dtype = layout
    if not offset:
        return torch.empty_strided(size, strides, dtype=dtype, device="meta")
    last = offset + sum((length - 1) * step for length, step in zip(size, strides, strict=True))
    return torch.empty(max(last + 1, 0), dtype=dtype, device="meta").as_strided(size, strides, offset)
