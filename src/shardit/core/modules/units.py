"""Units of an encoder: modules that one rank runs, which together hold nearly all of its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from shardit.core.modules.blocks import is_block_list


@dataclass(frozen=True)
class Unit:
    """One or more modules (several if they share weights) assigned to one owner, by name.

    parts: names and bytes of the smaller modules in it, if the module consists only of lists of callable modules.
    """

    names: tuple[str, ...]
    nbytes: int
    parts: tuple[tuple[str, int], ...] = ()


def find_units(model: nn.Module) -> list[Unit]:
    """Return the units of a model, in order of registration, which is nearly that of execution.

    Each element of an outermost block list is a unit, and so is each other module with parameters and without a block
    list (embeddings, last norms, heads). Every rank keeps all other parameters: those next to block lists, and modules
    that share weights with them.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in _outermost(model, ""):
        found.setdefault(id(module), (name, module))
    inside = tuple(f"{name}." for name, _ in found.values())
    replicated = {id(p) for name, p in model.named_parameters() if not name.startswith(inside)}
    groups: list[tuple[set[int], list[tuple[str, nn.Module]]]] = []
    for name, module in found.values():
        ids, members = {id(p) for p in module.parameters()}, [(name, module)]
        for tied in [group for group in groups if group[0] & ids]:
            groups.remove(tied)
            ids, members = ids | tied[0], tied[1] + members
        groups.append((ids, members))
    return [_unit(members) for ids, members in groups if not ids & replicated]


def _outermost(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if is_block_list(child):
            yield from ((f"{path}{name}.{i}", block) for i, block in child.named_children())
        elif any(is_block_list(part) for part in child.modules()):
            yield from _outermost(child, f"{path}{name}.")
        elif next(child.parameters(), None) is not None:
            yield f"{path}{name}", child


def _unit(members: list[tuple[str, nn.Module]]) -> Unit:
    parts: list[tuple[str, int]] = []
    if len(members) == 1:
        name, module = members[0]
        parts = [(path, _nbytes([(path, part)])) for path, part in _outermost(module, f"{name}.")]
        lists = {f"{name}.{child}." for child, part in module.named_children() if is_block_list(part)}
        if not all(path.rpartition(".")[0] + "." in lists for path, _ in parts):
            parts = []
    nbytes = _nbytes(members)
    return Unit(tuple(name for name, _ in members), nbytes, tuple(parts) if sum(n for _, n in parts) == nbytes else ())


def _nbytes(group: list[tuple[str, nn.Module]]) -> int:
    held = {id(p): p for _, module in group for p in module.parameters()}
    return sum(p.numel() * p.element_size() for p in held.values())
