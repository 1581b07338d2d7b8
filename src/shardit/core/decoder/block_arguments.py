"""The arguments of a block call, flattened once for blocks that get the same."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardit.core.decoder.shapes import Layouts, Returned, layouts, structure
from shardit.core.decoder.stage_tensor import StageTensor


@dataclass
class BlockArguments:
    """Arguments of a block call. Most blocks of a forward get the same objects, except for the first argument.

    structure: the number of what it has in common with calls whose results differ in sizes only. tensors: numbers of
    the leaves that are tensors. staged: those whose data some ranks have. first_alone: whether the first argument is
    the only one of these. mappings: dicts among the arguments, into which blocks may put what later ones read (keys and
    values that layers share); `args` and `kwargs` have copies of them. caches: those among the arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Any]
    spec: Any
    structure: int
    tensors: list[int]
    staged: list[StageTensor]
    first_alone: bool
    mappings: list[MutableMapping[Any, Any]]
    caches: list[Any]
    _layouts: dict[int, tuple[Layouts, Returned]] = field(default_factory=dict)

    @staticmethod
    def of(
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        mode: Any,
        numbers: dict[Any, int],
        caches_in: Callable[[Sequence[Any]], list[Any]],
    ) -> BlockArguments:
        """Flatten the arguments of a call. mode: what else results depend on. numbers: of the structures so far; a new
        one is added. caches_in: returns the caches among leaves."""
        mappings = [value for value in (*args, *kwargs.values()) if isinstance(value, MutableMapping)]
        if mappings:
            args, kwargs = tuple(map(_as_dict, args)), {name: _as_dict(value) for name, value in kwargs.items()}
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [q for q, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        staged = [leaf for leaf in leaves if type(leaf) is StageTensor]
        first_alone = bool(args) and len(staged) == 1 and staged[0] is args[0] and not mappings
        number = numbers.setdefault((mode, structure(leaves, spec)), len(numbers))
        caches = caches_in(leaves)
        return BlockArguments(args, kwargs, leaves, spec, number, tensors, staged, first_alone, mappings, caches)

    def next(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockArguments | None:
        """Look at the first argument of another call if all others are the same objects; else return None."""
        if not self.first_alone or len(args) != len(self.args) or len(kwargs) != len(self.kwargs):
            return None
        first, before, own = args[0], self.args[0], self.kwargs
        alike = type(first) is StageTensor and first.dtype == before.dtype and first.shape == before.shape
        if not alike or (len(args) > 1 and any(map(operator.is_not, args[1:], self.args[1:]))):
            return None
        for name, value in kwargs.items():
            if own.get(name, self) is not value:
                return None
        # A new object: another program may be paused in the call that this one describes.
        unchanged = self.spec, self.structure, self.tensors, [first], True, self.mappings, self.caches, self._layouts
        return BlockArguments(args, kwargs, [first, *self.leaves[1:]], *unchanged)

    def layouts(self, known: Returned) -> Layouts:
        """Return the layouts of the new tensors that a block returns, as far as they are known."""
        found = self._layouts.get(id(known))
        if found is None:
            found = self._layouts[id(known)] = layouts(known, self.leaves), known  # its id must not become another's
        return found[0]

    def with_data(self) -> tuple[list[Any], tuple[Any, ...], dict[str, Any]]:
        """Leaves, arguments and keyword arguments with plain tensors, on a rank that has all data."""
        leaves = [leaf.data_here if type(leaf) is StageTensor else leaf for leaf in self.leaves]
        if self.first_alone:
            return leaves, (leaves[0], *self.args[1:]), self.kwargs
        args, kwargs = tree_unflatten(leaves, self.spec)
        return leaves, args, kwargs

    def written(self, args: tuple[Any, ...], kwargs: dict[str, Any], before: list[dict[Any, Any]]) -> list[Any]:
        """Return the entries that a block has added to each mapping among its arguments."""
        now = [value for value in (*args, *kwargs.values()) if isinstance(value, MutableMapping)]
        return [
            {name: value for name, value in one.items() if name not in old or value is not old[name]}
            for one, old in zip(now, before, strict=True)
        ]


def of_kind(
    args: tuple[Any, ...], kwargs: dict[str, Any], mappings: list[Any]
) -> tuple[Any, Any, list[dict[Any, Any]]]:
    """Arguments with mappings of the classes that the block expects, in place of dicts; and what these held."""
    left, held = iter(mappings), []

    def made(value: Any) -> Any:
        if not isinstance(value, MutableMapping):
            return value
        held.append(dict(value))
        one = copy.copy(next(left))
        one.update(value)
        return one

    return tuple(map(made, args)), {name: made(value) for name, value in kwargs.items()}, held


def _as_dict(value: Any) -> Any:
    return dict(value) if isinstance(value, MutableMapping) else value
