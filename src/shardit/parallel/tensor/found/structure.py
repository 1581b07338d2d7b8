"""Groups of channels of a module's linears: channels that the code between them combines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from shardit.core.placement.slices import Parts, Segments, even_runs
from shardit.parallel.tensor.found.stand_ins import NoTrialError, StandIn, Trial

MOST_BLOCKS = 1024
"""Most blocks of channels that are moved in turn."""

FEWEST_BLOCKS = 32
"""Blocks that the narrowest linear should have, if its channels are not those of heads."""

APART = 1e-4
"""Smallest difference, relative to the largest value, that counts as one."""

Call = tuple[Sequence[Any], Mapping[str, Any]]
"""Arguments of the module."""


@dataclass(frozen=True)
class ChannelGroup:
    """Blocks of channels that belong together, such as a head: of the outputs of each linear in `into`, and of the
    inputs of each in `out`; numbers of blocks by the name of the linear."""

    into: tuple[tuple[str, tuple[int, ...]], ...]
    out: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def kind(self) -> Any:
        """Groups of one kind have equally many blocks of the same linears."""
        return tuple((name, len(blocks)) for name, blocks in (*self.into, *self.out))


@dataclass(frozen=True)
class Structure:
    """The groups of a module by their kind, and the channels of one block."""

    kinds: tuple[tuple[ChannelGroup, ...], ...]
    unit: int

    def runs_of_ranks(self, parts: Parts) -> list[list[tuple[int, int]]]:
        """Return for each kind the run of groups of each rank: first group, number of groups."""
        return [even_runs(len(groups), parts) for groups in self.kinds]

    def segments(self, side: str, parts: Parts) -> dict[str, tuple[Segments, ...]]:
        """Return the channels of each rank by the name of the linear; side: "into" or "out"."""
        found: dict[str, list[list[int]]] = {}
        for groups, runs in zip(self.kinds, self.runs_of_ranks(parts), strict=True):
            for rank, (start, count) in enumerate(runs):
                for group in groups[start : start + count]:
                    for name, blocks in getattr(group, side):
                        found.setdefault(name, [[] for _ in runs])[rank] += blocks
        return {name: tuple(self._joined(sorted(blocks)) for blocks in ranks) for name, ranks in found.items()}

    def _joined(self, blocks: list[int]) -> Segments:
        runs: list[list[int]] = []
        for block in blocks:
            if runs and sum(runs[-1]) == block:
                runs[-1][1] += 1
            else:
                runs.append([block, 1])
        return tuple((start * self.unit, length * self.unit) for start, length in runs)


def read_structure(trial: Trial, call: Call, names: Sequence[str], head: int | None) -> Iterator[Structure]:
    """Yield what the groups of the linears `names` may be. head: channels of one head, if there are heads.

    Raises NoTrialError if the code between them is of another kind.
    """
    result = trial.run(*call)
    seen = {name: [*linear.seen] for name, linear in trial.linears.items()}
    used = [name for name in names if seen[name]]
    into, out = _sides(trial, call, used, seen)
    widths = [trial.linears[name].width for name in into] + [trial.linears[name].size for name in out]
    common = gcd(*widths)
    units = [head] if head and common % head == 0 else []
    units += [common // n for n in range(FEWEST_BLOCKS, 4 * FEWEST_BLOCKS) if common % n == 0][:1]
    units += [1] if common < FEWEST_BLOCKS * 2 else []
    for unit in dict.fromkeys(units):
        if sum(widths) // unit <= MOST_BLOCKS:
            yield Structure(_groups(trial, call, into, out, unit, result, seen), unit)


def _sides(
    trial: Trial, call: Call, names: Sequence[str], seen: Mapping[str, list[torch.Tensor]]
) -> tuple[list[str], list[str]]:
    """Return the linears before the code that is to run on slices, and those behind it."""
    into: list[str] = []
    after: set[str] = set()
    for name in names:
        if name in after:
            continue
        linear = trial.linears[name]
        linear.moved = (0, linear.width)
        trial.run(*call)
        linear.moved = None
        changed = {other for other in names if _moved(seen[other], trial.linears[other].seen)}
        if changed and not changed & {*into}:
            into.append(name)
            after |= changed
    if not into:
        raise NoTrialError("no linear is followed by another one")
    return into, [name for name in names if name in after]


def _groups(
    trial: Trial,
    call: Call,
    into: list[str],
    out: list[str],
    unit: int,
    result: Any,
    seen: Mapping[str, list[torch.Tensor]],
) -> tuple[tuple[ChannelGroup, ...], ...]:
    """Move each block of outputs in turn, and join it with the blocks of inputs that change."""
    joined: dict[tuple[str, int], tuple[str, int]] = {}

    def root(node: tuple[str, int]) -> tuple[str, int]:
        while joined.setdefault(node, node) != node:
            node = joined[node]
        return node

    for name in into:
        linear = trial.linears[name]
        for block in range(linear.width // unit):
            linear.moved = (block * unit, unit)
            again = trial.run(*call)
            linear.moved = None
            if _moved(tensors_in(result), tensors_in(again)):
                raise NoTrialError("one of its outputs passes no linear")
            changed = False
            for other in out:
                for index in _moved_blocks(seen[other], trial.linears[other], unit):
                    joined[root((other, index))] = root((name, block))
                    changed = True
            if not changed or any(_moved(seen[other], trial.linears[other].seen) for other in seen if other not in out):
                raise NoTrialError("a part of a linear's output is used in another way")
    return _by_kind(into, out, {node: root(node) for node in list(joined)}, trial.linears, unit)


def _by_kind(
    into: list[str], out: list[str], roots: Mapping[Any, Any], linears: Mapping[str, StandIn], unit: int
) -> tuple[tuple[ChannelGroup, ...], ...]:
    members: dict[Any, dict[str, list[int]]] = {}
    for (name, block), root in sorted(roots.items()):
        members.setdefault(root, {}).setdefault(name, []).append(block)
    covered = {name: sum(len(found.get(name, ())) for found in members.values()) for name in (*into, *out)}
    widths = {name: linears[name].width for name in into} | {name: linears[name].size for name in out}
    if any(covered[name] * unit != widths[name] for name in widths):
        raise NoTrialError("its channels are no whole groups")
    kinds: dict[Any, list[ChannelGroup]] = {}
    for found in sorted(members.values(), key=lambda one: [one[name][0] for name in out if name in one]):
        sides = [tuple((name, tuple(found[name])) for name in side if name in found) for side in (into, out)]
        group = ChannelGroup(*sides)
        kinds.setdefault(group.kind, []).append(group)
    return tuple(map(tuple, kinds.values()))


def _moved_blocks(before: Sequence[torch.Tensor], linear: StandIn, unit: int) -> list[int]:
    """Return the blocks of a linear's input that are not what they were."""
    moved: set[int] = set()
    if len(before) != len(linear.seen):
        raise NoTrialError("it calls its linears more or less often")
    for was, now in zip(before, linear.seen, strict=True):
        apart = (was - now).abs().movedim(linear.dim, -1).flatten(0, -2).amax(0)
        scale = was.abs().amax()
        moved.update((apart.view(-1, unit).amax(-1) > APART * scale).nonzero().flatten().tolist())
    return sorted(moved)


def _moved(before: Sequence[torch.Tensor], now: Sequence[torch.Tensor]) -> bool:
    """Return whether tensors are not what they were."""
    return len(before) != len(now) or not all(close(a, b) for a, b in zip(before, now, strict=True))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether tensors differ by rounding at most."""
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape and torch.equal(a, b)
    return not a.numel() or bool((a - b).abs().amax() <= APART * a.abs().amax())


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors in a result."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
