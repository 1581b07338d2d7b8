"""Cuts modules that no rule names, as their forward shows it: a trial on slices gives what the whole gives."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardit.core.placement.slices import Parts, Segments, Shards
from shardit.parallel.tensor import rules as rules
from shardit.parallel.tensor.found.arguments import candidates
from shardit.parallel.tensor.found.stand_ins import NoTrialError, Trial, is_like_linear
from shardit.parallel.tensor.found.structure import Call, Structure, close, read_structure, tensors_in
from shardit.parallel.tensor.heads import has_hooks, is_linear, join, number_of
from shardit.parallel.tensor.plan import Cutter, Role

MOST_LINEARS = 24
"""Most linears of a module that is tried."""

Numbers = dict[str, tuple[int, ...]]
"""Numbers of the ranks, by attribute of the module."""


@dataclass(frozen=True)
class ModuleCut:
    """The cut of a module: channels of each rank, by name of the linear or depthwise convolution,
    and the numbers to set."""

    into: Mapping[str, tuple[Segments, ...]]
    out: Mapping[str, tuple[Segments, ...]]
    channels: Mapping[str, tuple[Segments, ...]]
    numbers: Numbers
    heads: bool


def cut_as_found(cutter: Cutter, name: str, module: nn.Module, known: dict[Any, ModuleCut | None]) -> bool:
    """Cut a module if a trial finds how. known: results of modules that are built alike. Returns whether it is cut."""
    linears = [part for part, one in module.named_modules() if is_like_linear(one)]
    inside = f"{name}." if name else ""
    units = tuple(unit.removeprefix(inside) for unit in cutter.plan.units if unit.startswith(inside))
    in_units = tuple(f"{unit}." for unit in units)
    names = tuple(p for p in linears if join(name, p) not in cutter.done and not p.startswith(in_units))
    if len(names) < 2 or len(linears) > MOST_LINEARS or has_hooks(module) or name in cutter.plan.units:
        return False
    kind = (_outline(module), names, units)
    if kind not in known:
        known[kind] = _find(module, names, units, cutter)
    if (found := known[kind]) is None:
        return False
    for part, ranks in found.into.items():
        _columns(cutter, join(name, part), module.get_submodule(part), ranks)
    for part, ranks in found.channels.items():
        channels = module.get_submodule(part)
        _columns(cutter, join(name, part), channels, ranks)
        lengths = cutter.plan.cuts[join(name, part, "weight")].lengths
        full: dict[str, int] = dict.fromkeys(("in_channels", "groups"), sum(lengths))
        cutter.set_numbers(join(name, part), channels, full, lengths)
    for part, ranks in found.out.items():
        _rows(cutter, join(name, part), module.get_submodule(part), ranks)
    for attribute, numbers in found.numbers.items():
        cutter.set_numbers(name, module, {attribute: sum(numbers)}, numbers)
    cutter.attentions += found.heads
    cutter.plan.units.append(name)
    return True


def _columns(cutter: Cutter, name: str, module: Any, ranks: tuple[Segments, ...]) -> None:
    cut = Shards(0, module.weight.shape[0], ranks)
    if is_linear(module):
        cutter.columns(name, module, cut)
    else:
        cutter.tensors(name, module, cut)
        cutter.set_numbers(name, module, {"out_channels": cut.total}, cut.lengths)


def _rows(cutter: Cutter, name: str, module: Any, ranks: tuple[Segments, ...]) -> None:
    cut = Shards(0, module.weight.shape[1], ranks)
    cutter.rows(name, module, cut)
    if not is_linear(module):
        cutter.set_numbers(name, module, {"in_channels": cut.total}, cut.lengths)
        cutter.plan.roles[name] = Role("channels", Shards(1, cut.total, ranks))


def _outline(module: nn.Module) -> Any:
    """Return a key for modules that are built alike."""
    numbers = [
        (name, type(one), sorted((key, value) for key, value in vars(one).items() if isinstance(value, (int, str))))
        for name, one in module.named_modules()
    ]
    shapes = [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]
    processors = [type(vars(one).get("processor")) for one in module.modules()]
    return repr((numbers, shapes, processors))


def _find(module: nn.Module, names: tuple[str, ...], units: tuple[str, ...], cutter: Cutter) -> ModuleCut | None:
    """Return how a module can be cut; None if no trial shows it."""
    head = number_of(module, (*rules.HEAD_SIZES, *rules.FURTHER_HEAD_SIZES))
    for pairs in (False, True) if units else (False,):
        try:
            trial, again = Trial(module, units, pairs), Trial(module, units, pairs)
        except Exception:  # objects that cannot be copied: anything may come from there
            return None
        first = trial.linears[names[0]]
        for call in candidates(module, first.size, first.dim == 1, cutter.family):
            try:
                for structure in read_structure(trial, call, names, head):
                    if found := _confirmed(trial, again, call, structure, cutter.parts):
                        return found
            except NoTrialError:
                return None
            except Exception:  # the module takes other arguments
                continue
    return None


def _confirmed(trial: Trial, again: Trial, call: Call, structure: Structure, parts: Parts) -> ModuleCut | None:
    """Return the cut if the code gives on the slices of every rank what it gives of the whole."""
    count = parts if isinstance(parts, int) else len(parts)
    if any(len(groups) < count for groups in structure.kinds):
        return None
    into, out = structure.segments("into", parts), structure.segments("out", parts)
    channels = {name: _like(into, trial, vars(conv)["in_channels"]) for name, conv in trial.channels.items()}
    if not all(channels.values()):
        return None
    for numbers in _numbers(trial.module, structure, parts):
        cut = ModuleCut(into, out, channels, numbers, any(name in rules.HEAD_COUNTS for name in numbers))
        if all(_is_right(trial, copy.deepcopy(again), call, cut, rank) for rank in range(count)):
            return cut
    return None


def _like(into: Mapping[str, tuple[Segments, ...]], trial: Trial, width: int) -> tuple[Segments, ...]:
    """Return the segments of the linear before a convolution of each channel apart."""
    return next((ranks for name, ranks in into.items() if trial.linears[name].width == width), ())


def _numbers(module: nn.Module, structure: Structure, parts: Parts) -> Iterator[Numbers]:
    """Yield the numbers that may have to be set: counts of heads and widths, counts alone, none."""
    counts: Numbers = {}
    widths: Numbers = {}
    for groups, runs in zip(structure.kinds, structure.runs_of_ranks(parts), strict=True):
        _, blocks = groups[0].out[0]
        size = len(blocks) * structure.unit
        for names, unit, found in ((rules.HEAD_COUNTS, 1, counts), (_WIDTHS, size, widths)):
            for name in names:
                if vars(module).get(name) == unit * len(groups):
                    found.setdefault(name, tuple(unit * count for _, count in runs))
    yield {**counts, **widths}
    if widths:
        yield counts
    if counts:
        yield {}


_WIDTHS = (*rules.QUERY_WIDTHS, *rules.KEY_WIDTHS, *rules.HIDDEN_WIDTHS)


def _is_right(trial: Trial, part: Trial, call: Call, cut: ModuleCut, rank: int) -> bool:
    """Return whether one rank's part, a copy, gives the linears behind it the rank's part of what they get of the
    whole."""
    expected = trial.run(*call)
    seen = {name: [*linear.seen] for name, linear in trial.linears.items()}
    for name, ranks in cut.into.items():
        part.linears[name].share = ranks[rank]
    for name, ranks in cut.channels.items():
        _narrow(part.channels[name], Shards(0, vars(trial.channels[name])["out_channels"], ranks), rank)
    for name, numbers in cut.numbers.items():
        setattr(part.module, name, numbers[rank])
    try:
        got = part.run(*call)
    except Exception:  # it counts on all channels
        return False
    for name, linear in part.linears.items():
        wanted = seen[name]
        if name in cut.out:
            wanted = [_taken(one, cut.out[name], rank, linear.dim) for one in wanted]
        if len(wanted) != len(linear.seen) or not all(map(close, wanted, linear.seen)):
            return False
    wanted, given = tensors_in(expected), tensors_in(got)
    return len(wanted) == len(given) and all(map(close, wanted, given))


def _taken(tensor: torch.Tensor, ranks: tuple[Segments, ...], rank: int, dim: int) -> torch.Tensor:
    return Shards(dim % tensor.ndim, tensor.shape[dim], ranks).of(rank).take(tensor)


def _narrow(conv: Any, cut: Shards, rank: int) -> None:
    """Give a convolution of each channel apart the channels of one rank."""
    for name, held in list(conv.named_parameters()):
        setattr(conv, name, nn.Parameter(cut.of(rank).take(held), False))
    conv.in_channels = conv.out_channels = conv.groups = cut.lengths[rank]
