"""Reads attention modules: number of heads, and whether a rule covers all parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from torch import nn

from shardit.core.placement.head_counts import heads_fit
from shardit.core.placement.slices import Parts, Shards, even, even_runs
from shardit.parallel.tensor import rules as rules


@dataclass(frozen=True)
class Heads:
    """Query heads, key (and value) heads, and the channels of one head. replicates: whether ranks may have copies of
    key heads if there are fewer key heads than ranks. gates: 2 if each query comes with a gate, else 1."""

    queries: int
    keys: int
    size: int
    replicates: bool = False
    gates: int = 1

    def fit(self, ranks: int) -> bool:
        """Whether each rank gets key heads, or copies of the key heads that it needs."""
        return ranks <= self.keys or (self.replicates and heads_fit(ranks, self.queries, self.keys))

    def key_shards(self, parts: Parts) -> Shards:
        if (shared := self._shared(parts)) is None:
            return even(self.keys * self.size, parts, unit=self.size)
        runs = [tuple((key * self.size, self.size) for key in keys) for keys, _ in shared]
        return Shards(0, self.keys * self.size, tuple(runs))

    def query_shards(self, parts: Parts) -> Shards:
        """Return the shards of query heads; a rank has the query heads that use its key heads."""
        unit = self.queries // self.keys if self._shared(parts) is None else 1
        return even(self.queries * self.size, parts, unit=unit * self.size)

    def gated_query_shards(self, parts: Parts) -> Shards:
        """Return the shards of query heads with their gates."""
        cut, gates = self.query_shards(parts), self.gates
        ranks = tuple(tuple((start * gates, length * gates) for start, length in one) for one in cut.ranks)
        return Shards(0, cut.total * gates, ranks)

    def groups(self, parts: Parts) -> list[int]:
        """Return the number of query heads of each rank that share one of its key heads."""
        shared = self._shared(parts)
        count = parts if isinstance(parts, int) else len(parts)
        return [self.queries // self.keys] * count if shared is None else [group for _, group in shared]

    def _shared(self, parts: Parts) -> list[tuple[list[int], int]] | None:
        """With more ranks than key heads: for each rank the key heads of its query heads, and the number of these that
        share one. Otherwise None."""
        if not isinstance(parts, int) or parts <= self.keys:
            return None
        found, group = [], self.queries // self.keys
        for start, count in even_runs(self.queries, parts):
            keys = [query // group for query in range(start, start + count)]
            together = gcd(*(keys.count(key) for key in set(keys)))  # each key head needs equally many
            found.append((keys[::together], together))
        return found


def is_attention(module: nn.Module, names: rules.Attention) -> bool:
    """Return whether a module has the parts of a rule: keys and values may be those of another layer, and values the
    keys, with None in their place."""
    if part_of(module, names.query[0]) is None:
        return False
    keys, *values = names.key_value[:2]
    own = part_of(module, keys) is not None and all(
        part_of(module, part) is not None or vars(module).get(part, module) is None for part in values
    )
    return own or borrows(module, names)


def borrows(module: nn.Module, names: rules.Attention) -> bool:
    """Return whether attention takes keys and values from another layer."""
    return bool(names.borrows) and bool(vars(module).get(names.borrows)) and not present(module, names.key_value)


def read_heads(module: nn.Module, names: rules.Attention, family: rules.Family, out: bool = True) -> Heads | str:
    """Return the heads of an attention module, or the reason why its parts are not attention that can be cut.

    out: whether the linear behind the heads is its own, rather than one of the block around it.
    """
    known = (*names.query, *names.key_value, *names.out, *names.query_norms, *names.key_norms, *names.per_head)
    known = (*known, *names.head_vectors, *names.head_gates, *names.full_input)
    unmatched = unknown_part(module, (*known, "processor"))  # that is matched separately
    if unmatched is not None:
        return f"no rule matches {unmatched}"
    linears = [*names.query, *names.key_value, *names.out, *names.head_gates]
    strange = [part for part in present(module, linears) if not is_linear(part_of(module, part)) and part != "to_out"]
    if strange:
        return f"{strange[0]} is no plain linear"
    tables = present(module, names.per_head)
    if not all(runs_as(part_of(module, part), rules.EMBEDDING) for part in tables):
        return f"{tables[0]} has a forward of its own"
    if any(part_of(module, part).max_norm is not None for part in tables):
        return f"{tables[0]} changes the rows that it looks up (max_norm)"
    query, keys = (part_of(module, part) for part in (names.query[0], names.key_value[0]))
    size = number_of(module, rules.HEAD_SIZES)
    count = number_of(module, rules.HEAD_COUNTS)
    if size is None and count and query.out_features % count == 0:
        size = query.out_features // count
    group = number_of(module, rules.KEY_GROUPS) if borrows(module, names) else None
    width = query.out_features // group if group else getattr(keys, "out_features", 0)
    if not size or not width or query.out_features % size or width % size:
        return "its number of heads is not known"
    behind = [part_of(module, part).in_features for part in present(module, names.out) if names.gated]
    gates = 2 if 2 * max(behind, default=0) == query.out_features else 1
    queries = query.out_features // (size * gates)
    heads = Heads(queries, width // size, size, family.replicates_keys, gates)
    if (count is not None and count != heads.queries) or heads.queries % heads.keys:
        return "its number of heads is not known"
    return _misfit(module, names, heads, family, out) or heads


def read_fused_heads(module: nn.Module, names: rules.FusedAttention, family: rules.Family) -> Heads | None:
    """Read the heads of attention with one linear for queries, keys and values; None if its sizes do not fit."""
    into, out = part_of(module, names.into).out_features, part_of(module, names.out).in_features
    count, size = number_of(module, rules.HEAD_COUNTS), number_of(module, (*rules.HEAD_SIZES, "head_size"))
    if count and out % count == 0:
        size = out // count
    if not size or out % size or (into - out) % (2 * size) or into <= out:
        return None
    heads = Heads(out // size, (into - out) // (2 * size), size, family.replicates_keys)
    fits = heads.queries % heads.keys == 0 and (not names.by_head or heads.queries == heads.keys)
    return heads if fits else None


def _misfit(module: nn.Module, names: rules.Attention, heads: Heads, family: rules.Family, out: bool) -> str | None:
    """Return the first part of an attention module whose size does not fit the heads."""
    query, keys = heads.queries * heads.size, heads.keys * heads.size
    widths = [(names.query[0], "out_features", query * heads.gates)]
    widths += [(part, "out_features", query) for part in names.query[1:]]
    widths += [(part, "out_features", keys) for part in names.key_value]
    widths += [(part, "in_features", query) for part in names.out]
    widths += [(part, "out_features", heads.queries) for part in names.head_gates]
    for part, side, width in widths:
        found = part_of(module, part)
        if is_linear(found) and getattr(found, side) != width:
            return f"{part} does not go with its heads"
    if out != any(is_linear(part_of(module, part)) for part in names.out):
        return "the linear behind its heads was not found"
    for part in present(module, (*names.query_norms, *names.key_norms)):
        if isinstance(part_of(module, part), nn.Identity):
            continue
        norm, across = part_of(module, part), query if part in names.query_norms else keys
        size = norm_size(norm)
        if size is None and not any(True for _ in norm.parameters()):  # of one head or of all: the first call shows it
            continue
        if size != heads.size and not (size == across and _is_rms(norm, family)):
            return f"{part} is a norm of another kind"
    return None


def norm_size(norm: Any) -> int | None:
    """Return the channels of a norm; 0 if its size is not an attribute."""
    shape = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", None)
    if isinstance(shape, Sequence) and len(shape) == 1:
        return int(shape[0])
    weight = getattr(norm, "weight", None)
    return weight.numel() if isinstance(weight, nn.Parameter) else None


def _is_rms(norm: Any, family: rules.Family) -> bool:
    """Return whether a norm across all heads can be cut: x * rsqrt(mean(x^2) + eps) * weight, and no more."""
    known = any(runs_as(norm, name) for name in (rules.RMS_NORM, *family.rms_norms)) and not has_hooks(norm)
    return known and norm.weight is not None and getattr(norm, "bias", None) is None


def is_linear(module: Any) -> bool:
    """Return whether a module is a plain linear: quantized ones, derived ones and adapters' layers compute something
    else, parametrized ones have weights of other kinds, and a hook would see slices."""
    return type(module) is nn.Linear and module._parameters.keys() <= {"weight", "bias"} and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Return whether hooks read the inputs or outputs of a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def runs_as(module: Any, name: str) -> bool:
    """Return whether the forward of a module is that of the class with this full name, not of a derived class or of one
    with the same short name."""
    forward = type(module).forward
    return f"{forward.__module__}.{forward.__qualname__}" == f"{name}.forward"


def part_of(module: nn.Module, path: str) -> Any:
    """Return the submodule at a path, or None."""
    for name in path.split("."):
        module = module._modules.get(name) if isinstance(module, nn.Module) else None  # pyright: ignore[reportAssignmentType]
    return module


def present(module: nn.Module, parts: Iterable[str]) -> list[str]:
    """Return the paths at which the module has a submodule."""
    return [part for part in parts if part_of(module, part) is not None]


def number_of(module: nn.Module, attributes: Iterable[str]) -> int | None:
    """Return the first of these attributes that is a whole number, or None."""
    found = (vars(module).get(name) for name in attributes)
    return next((value for value in found if isinstance(value, int)), None)


def all_known(module: nn.Module, parts: Iterable[str]) -> bool:
    """Return whether everything below a module belongs to one of the given parts."""
    return unknown_part(module, parts) is None


def unknown_part(module: nn.Module, parts: Iterable[str]) -> str | None:
    """Return a parameter, or a norm without parameters, below a module that belongs to none of the given parts."""
    inside = tuple(f"{part}." for part in parts)
    for name, _ in module.named_parameters():
        if not f"{name}.".startswith(inside):
            return name
    for name, child in module.named_modules():
        if name and "Norm" in type(child).__name__ and not f"{name}.".startswith(inside):
            return name
    return None


def names_in(prefix: str, module: nn.Module) -> list[str]:
    """Return the full names of a module and of all below it."""
    return [join(prefix, name) for name, _ in module.named_modules()]


def join(*parts: str) -> str:
    """Join parts of a module name; empty ones are left out."""
    return ".".join(part for part in parts if part)


def owner_of(parameter: str) -> str:
    """Return the name of the module that a parameter belongs to."""
    return parameter.rpartition(".")[0]
