"""Splits a model at its block calls: finds the block lists and moves blocks of other ranks to meta."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes as without_modes

from shardit.core.modules.block_calls import BlockCalls
from shardit.core.modules.block_names import SMALL_SHARE
from shardit.core.modules.hints import Plan
from shardit.core.modules.patching import set_tensor
from shardit.errors import UnsupportedError


@dataclass
class CutModel:
    """A model whose blocks are on several stages.

    owners[i]: stage of block i. ran[i]: number of times this rank ran block i (0 if another rank owns it). generators:
    random generators of its modules and hooks.
    """

    model: nn.Module
    blocks: list[tuple[str, nn.Module]]
    owners: list[int]
    calls: BlockCalls = field(default_factory=BlockCalls)
    ran: Counter[int] = field(default_factory=Counter)
    generators: list[Any] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return the name of the model's class."""
        return type(self.model).__name__

    @contextmanager
    def untraced(self) -> Iterator[None]:
        """Run blocks directly for a while, at any point of a forward, with tracing suspended."""
        with self.calls.intercepted_by(None), without_modes():
            yield


def find_blocks(model: nn.Module, plan: Plan | None = None) -> list[tuple[str, nn.Module]]:
    """Return the (name, block) pairs of a model's block lists, in the order in which a forward runs the lists.

    A block list is an outermost ModuleList that holds at least SMALL_SHARE of the parameters, or the most of all lists,
    and whose elements have parameters and their own forward. The lists are in order of registration unless the plan
    gives an order. A block that occurs several times is returned once, although it is called several times. Raises
    UnsupportedError if the plan names a list that does not exist.
    """
    lists = dict(_outermost_lists(model, ""))
    if plan is not None and plan.order is not None:
        missing = [name for name in plan.order if name not in lists]
        if missing:
            raise UnsupportedError(f"plan.order names {missing[0]!r}; the block lists are {sorted(lists)}")
        chosen = list(plan.order)
    else:
        total = sum(p.numel() for p in model.parameters()) or 1
        chosen = [name for name, blocks in lists.items() if _numel(blocks) >= SMALL_SHARE * total]
        largest = max(lists, key=lambda name: _numel(lists[name]), default=None)
        chosen = chosen or ([largest] if largest else [])  # if a vocabulary has nearly all parameters
    once: dict[int, tuple[str, nn.Module]] = {}
    for name in chosen:
        for i, block in enumerate(lists[name]):
            once.setdefault(id(block), (f"{name}.{i}", block))
    return list(once.values())


def blocks_named(model: nn.Module, names: Collection[str], plan: Plan | None = None) -> list[tuple[str, nn.Module]]:
    """Return the blocks with these names, found when the model was whole: slices have other shares of the parameters.
    Without names, what `find_blocks` returns."""
    return [(name, model.get_submodule(name)) for name in names] or find_blocks(model, plan)


def lacks_data(module: nn.Module) -> bool:
    """Return whether a module has a parameter or a buffer on meta."""
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def _outermost_lists(module: nn.Module, prefix: str) -> Iterable[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList) and is_block_list(child):
            yield path, child
        else:
            yield from _outermost_lists(child, f"{path}.")


def is_block_list(module: nn.Module) -> bool:
    """Return whether a module is a ModuleList of callable modules, each with parameters. A list
    with a module without any (the dropout of a feed-forward) is a sequence of operations."""
    return isinstance(module, nn.ModuleList) and len(module) > 0 and all(_callable(block) for block in module)


def _callable(block: nn.Module) -> bool:
    has_forward = type(block).forward is not nn.Module.forward
    has_parameters = next(block.parameters(), None) is not None
    return has_forward and has_parameters and not isinstance(block, (nn.ModuleList, nn.ModuleDict))


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def drop_blocks(
    model: nn.Module,
    blocks: list[tuple[str, nn.Module]],
    owners: list[int],
    rank: int,
    plan: Plan | None,
    shared: Collection[int] = (),
) -> None:
    """Move the blocks of other ranks to meta, in place: names and indices stay, the memory is released.

    Parameters that the plan replicates keep their data. So do those tied to parameters of this rank, and those that
    another component also has (`shared`: their ids).
    """
    keep = plan.replicate if plan is not None else ()
    others = [block for block, owner in zip(blocks, owners, strict=True) if owner != rank]
    held = _outside(model, others) | set(shared)
    for (name, block), owner in zip(blocks, owners, strict=True):
        if owner == rank:
            continue
        for path, parameter in list(block.named_parameters(recurse=True)):
            if not keeps(f"{name}.{path}", keep) and not parameter.is_meta and id(parameter) not in held:
                meta = torch.empty_like(parameter, device="meta")
                set_tensor(block, path, nn.Parameter(meta, parameter.requires_grad))
        for path, buffer in list(block.named_buffers(recurse=True)):
            if not keeps(f"{name}.{path}", keep) and not buffer.is_meta and id(buffer) not in held:
                set_tensor(block, path, torch.empty_like(buffer, device="meta"))


def keeps(name: str, prefixes: tuple[str, ...]) -> bool:
    """Return whether a parameter name equals one of the given names or is below one of them."""
    return any(name == p or name.startswith(f"{p}.") for p in prefixes)


def inner_tensors(model: nn.Module, blocks: list[tuple[str, nn.Module]]) -> dict[int, tuple[int, str]]:
    """Return the locations of parameters and buffers that only blocks have: id -> (number of the block, path in it)."""
    outside = _outside(model, blocks)
    found: dict[int, tuple[int, str]] = {}
    for number, (_, block) in enumerate(blocks):
        for path, tensor in [*block.named_parameters(), *block.named_buffers()]:
            if id(tensor) not in outside:
                found.setdefault(id(tensor), (number, path))
    return found


def _outside(model: nn.Module, blocks: list[tuple[str, nn.Module]]) -> set[int]:
    """Return the ids of the parameters and buffers that modules outside the given blocks have."""
    found, seen, todo = set[int](), {id(block) for _, block in blocks}, [model]
    while todo:
        module = todo.pop()
        if id(module) not in seen:
            seen.add(id(module))
            tensors = (*module._parameters.values(), *module._buffers.values())
            found |= {id(tensor) for tensor in tensors if tensor is not None}
            todo += [child for child in module._modules.values() if child is not None]
    return found


def nbytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters, on meta or not."""
    return sum(p.numel() * p.element_size() for p in module.parameters())
