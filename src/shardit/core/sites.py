"""Call sites: finding the block lists of a model, and the seam at each block's `__call__`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from shardit.core.plan import Plan
from shardit.errors import UnsupportedError

SMALL_SHARE = 0.02
"""Block lists with a smaller share of the parameters are kept whole on every rank."""

SWAPPED = "shardit_swapped"
"""An attribute of the classes that are made here."""


class Seam(Protocol):
    """Whoever decides what a block call does while a forward of its model runs."""

    def block_call(self, index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called instead of block number `index`; `call` is the block's own `__call__`."""
        ...


def find_blocks(model: nn.Module, plan: Plan | None = None) -> list[tuple[str, nn.Module]]:
    """The (name, block) pairs of a model's block lists, in the order in which a forward runs the lists.

    A block list is an outermost ModuleList whose elements are modules with a forward of their own and that holds at
    least SMALL_SHARE of the parameters. The order is that of registration unless the plan gives one. Raises
    UnsupportedError where the plan names a list that is not there.
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
    return [(f"{name}.{i}", block) for name in chosen for i, block in enumerate(lists[name])]


def _outermost_lists(module: nn.Module, prefix: str) -> Iterable[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList) and is_block_list(child):
            yield path, child
        else:
            yield from _outermost_lists(child, f"{path}.")


def is_block_list(module: nn.Module) -> bool:
    """Whether a module is a ModuleList of modules that can be called."""
    return isinstance(module, nn.ModuleList) and len(module) > 0 and all(_callable(block) for block in module)


def _callable(block: nn.Module) -> bool:
    has_forward = type(block).forward is not nn.Module.forward
    return has_forward and not isinstance(block, (nn.ModuleList, nn.ModuleDict))


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def swap_class(module: Any, members: dict[str, Any]) -> None:
    """Give a module a subclass of its own class, with the same name and the given members, in place.

    The seam is a class, not a wrapper: names, indices, isinstance, LoRA keys and checkpoints stay as they are. And it
    is at `__call__`, outside everything that replaces `forward` (compile, accelerate and cache hooks).
    """
    cls = type(module)
    known = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, SWAPPED: True}
    members = {**known, **members}
    module.__class__ = type(cls.__name__, (cls,), members)


CHANGE = ("set_", "load_", "_load_", "unload_", "fuse_", "unfuse_", "enable_", "disable_", "delete_", "add_")
"""How the names of methods begin that change what a model computes."""


def changing_methods(cls: type, first: Callable[[], None]) -> dict[str, Callable[..., Any]]:
    """The methods of a class that change what it computes, each with `first` before it: calls in flight are of the
    model as it was."""

    def method(own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def change(self: Any, *args: Any, **kwargs: Any) -> Any:
            first()
            return own(self, *args, **kwargs)

        return change

    names = [name for name in dir(cls) if name.startswith(CHANGE) and not hasattr(nn.Module, name)]
    found = {name: getattr(cls, name) for name in names}
    plain = {name: own for name, own in found.items() if inspect.isfunction(own)}
    return {name: method(own) for name, own in plain.items()}


def plain_class(thing: Any) -> type:
    """The class that something had before `swap_class`."""
    return next(cls for cls in type(thing).__mro__ if SWAPPED not in vars(cls))


Made = dict[tuple[Any, ...], type]
"""Classes made by `share_class`, by what they were made of."""


def share_class(module: Any, made: Made, key: tuple[Any, ...], members: Callable[[], dict[str, Any]]) -> None:
    """As `swap_class`, with one class for all modules of a class and key: what torch compiles for one fits all."""
    key = (type(module), *key)
    if key not in made:
        swap_class(module, members())
        made[key] = type(module)
    module.__class__ = made[key]


def fixed_place(plain: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """A `to` for modules of which some rank has a part on meta: changes of dtype are fine, moves are refused, on every
    rank alike, whatever it has itself."""

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found: Any = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        target, dtype, _, layout = found
        if target is not None and target.type != device.type:
            raise UnsupportedError("a parallel model cannot be moved: choose the device when it is made parallel")
        changes = {"dtype": dtype, "memory_format": layout}
        changes = {name: value for name, value in changes.items() if value is not None}
        return plain(self, **changes) if changes else self

    return to


def install(blocks: list[tuple[str, nn.Module]], current: dict[str, Seam | None]) -> None:
    """Put the seam at every block. While `current["seam"]` is None blocks behave as if nothing had been done."""
    for index, (_, block) in enumerate(blocks):
        swap_class(block, {"__call__": _seam_call(type(block).__call__, index, current)})


def _seam_call(own_call: Any, index: int, current: dict[str, Seam | None]) -> Any:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seam = current["seam"]
        if seam is None:
            return own_call(self, *args, **kwargs)
        return seam.block_call(index, own_call.__get__(self), args, kwargs)

    return __call__


def drop_blocks(
    model: nn.Module,
    blocks: list[tuple[str, nn.Module]],
    owners: list[int],
    rank: int,
    plan: Plan | None,
    shared: Collection[int] = (),
) -> None:
    """Move the blocks of other ranks to meta, in place: names and indices stay, the memory goes.

    Parameters that the plan replicates keep their data, and so do those that are tied to what this rank has, and those
    that another component has, too (`shared`: their ids).
    """
    keep = plan.replicate if plan is not None else ()
    others = [block for block, owner in zip(blocks, owners, strict=True) if owner != rank]
    held = _outside(model, others) | set(shared)
    for (name, block), owner in zip(blocks, owners, strict=True):
        if owner == rank:
            continue
        for path, parameter in list(block.named_parameters(recurse=True)):
            if not keeps(f"{name}.{path}", keep) and not parameter.is_meta and id(parameter) not in held:
                put(block, path, nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad))
        for path, buffer in list(block.named_buffers(recurse=True)):
            if not keeps(f"{name}.{path}", keep) and not buffer.is_meta and id(buffer) not in held:
                put(block, path, torch.empty_like(buffer, device="meta"))


def keeps(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a parameter name is one of the given names or below one of them."""
    return any(name == p or name.startswith(f"{p}.") for p in prefixes)


def put(module: nn.Module, path: str, tensor: torch.Tensor) -> None:
    """Replace a parameter or a buffer of a module, or of one below it, by another of its kind."""
    *parents, leaf = path.split(".")
    for name in parents:
        module = getattr(module, name)
    if isinstance(tensor, nn.Parameter):
        module._parameters[leaf] = tensor
    else:
        module._buffers[leaf] = tensor


def inner_tensors(model: nn.Module, blocks: list[tuple[str, nn.Module]]) -> dict[int, tuple[int, str]]:
    """Where the parameters and buffers that only blocks have are: id -> (number of the block, path in it)."""
    outside = _outside(model, blocks)
    found: dict[int, tuple[int, str]] = {}
    for number, (_, block) in enumerate(blocks):
        for path, tensor in [*block.named_parameters(), *block.named_buffers()]:
            if id(tensor) not in outside:
                found.setdefault(id(tensor), (number, path))
    return found


def _outside(model: nn.Module, blocks: list[tuple[str, nn.Module]]) -> set[int]:
    """The ids of the parameters and buffers that something else than the given blocks has."""
    inside = tuple(f"{name}." for name, _ in blocks)
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {id(tensor) for name, tensor in named if not name.startswith(inside)}
