"""Which parameters of a model are cut over the ranks of the tensor axis, and how: found from `tensor_rules`.

The scheme is that of Megatron-LM (Shoeybi et al., 2019): linears into heads or hidden channels by columns, linears out
of them by rows, one sum over the ranks behind each. Where shapes and names do not fit a rule exactly, nothing is cut.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import nn

from ..core.slices import Shards, even, even_runs, shards
from ..errors import UnsupportedError
from . import tensor_rules as rules
from .tensor_heads import (
    Heads,
    all_known,
    is_linear,
    join,
    names_in,
    norm_size,
    number_of,
    owner_of,
    part_of,
    present,
    read_heads,
)

Kind = Literal["rows", "gathered", "vocabulary", "norm"]


@dataclass(frozen=True)
class Role:
    """What a module does besides computing on its slice; `shards` is how its weight is cut.

    rows: sums its output. gathered: gathers it. vocabulary: looks up its own rows, then sums. norm: sums the squares.
    Linears cut by columns need no role: their outputs are cut.
    """

    kind: Kind
    shards: Shards


@dataclass
class TensorPlan:
    """How one model is cut over `size` ranks, for all of them.

    cuts: by parameter name (every name of tied weights); what is not there is whole on every rank. roles: by module
    name. attributes: by module name, numbers to set on it, one for each rank. notes: what was left whole against
    expectation, and why.
    """

    size: int
    cuts: dict[str, Shards] = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    attributes: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def plan_tensors(model: nn.Module, size: int, *, must_cut: bool = False) -> TensorPlan:
    """Plan the cut of a whole model (on meta or not) over `size` ranks; the same on every rank.

    `must_cut`: raise UnsupportedError where nothing can be cut, or where no attention has a head for every rank.
    """
    builder = _Builder(model, size)
    for name, module in model.named_modules():
        if name not in builder.done:
            builder.visit(name, module)
    if must_cut and builder.too_few and not builder.attentions:
        most = max(builder.too_few)
        raise UnsupportedError(
            f"tensor_parallel_size={size} does not fit {type(model).__name__}: its attention has {most} heads to deal "
            f"out; use 1{f' to {most}' if most > 1 else ''}"
        )
    builder.agree_on_tied()
    if must_cut and not builder.plan.cuts:
        raise UnsupportedError(
            f"{type(model).__name__} has no attention or feed-forward that tensor parallelism knows; use "
            "tensor_parallel_size=1"
        )
    return builder.plan


class _Builder:
    def __init__(self, model: nn.Module, size: int):
        self.model, self.size = model, size
        self.plan = TensorPlan(size)
        self.done: set[str] = set()  # names of modules that a rule for one above them has dealt with
        self.too_few: list[int] = []
        self.attentions = 0

    def visit(self, name: str, module: Any) -> None:
        """Apply the first rule that fits a module."""
        for rule in (self.parallel_block, self.attention, self.fused_attention, self.feed_forward, self.sequence):
            if rule(name, module):
                return
        if isinstance(module, nn.Embedding):
            self.vocabulary(name, module)
        elif any(re.search(pattern, name) for pattern in rules.GATHERED) and is_linear(module):
            self.gathered(name, module)

    # Rules: each returns whether it has dealt with the module.

    def attention(self, name: str, module: nn.Module, out: bool = True) -> bool:
        """Attention by heads; with out=False the linear behind the heads belongs to the block around it."""
        names = next(
            (n for n in rules.ATTENTIONS if all(part_of(module, p) for p in (n.query[0], *n.key_value[:2]))), None
        )
        if names is None:
            return False
        heads = read_heads(module, names, out)
        if isinstance(heads, str):
            self.plan.notes.append(f"{name} is whole on every rank: {heads}")
            return True
        if heads.keys < self.size:
            self.too_few.append(heads.keys)
            self.plan.notes.append(f"{name} is whole on every rank: {heads.keys} heads cannot be dealt to {self.size}")
            return True
        self._cut_attention(name, module, names, heads)
        return True

    def _cut_attention(self, name: str, module: nn.Module, names: rules.Attention, heads: Heads) -> None:
        query, keys = heads.query_shards(self.size), heads.key_shards(self.size)
        for part in present(module, names.query):
            self.columns(join(name, part), part_of(module, part), query)
        for part in present(module, names.key_value):
            self.columns(join(name, part), part_of(module, part), keys)
        for part in present(module, names.out):
            if isinstance(part_of(module, part), nn.Linear):
                self.rows(join(name, part), part_of(module, part), query)
        for parts, cut in ((names.query_norms, query), (names.key_norms, keys)):
            for part in present(module, parts):
                if norm_size(part_of(module, part)) == cut.total != heads.size:
                    self.tensors(join(name, part), part_of(module, part), cut)
                    self.plan.roles[join(name, part)] = Role("norm", cut)
        for part in present(module, names.per_head):
            table = part_of(module, part)
            cut = even(heads.queries, self.size, dim=1)
            self.plan.cuts[join(name, f"{part}.weight")] = cut
            self.set_numbers(join(name, part), table, {"embedding_dim": heads.queries}, cut.lengths)
            self.done.add(join(name, part))
        self._set_heads(name, module, heads, query, keys)
        self.attentions += 1

    def _set_heads(self, name: str, module: nn.Module, heads: Heads, query: Shards, keys: Shards) -> None:
        for attributes, full, lengths in (
            (rules.HEAD_COUNTS, heads.queries, [n // heads.size for n in query.lengths]),
            (rules.KEY_HEAD_COUNTS, heads.keys, [n // heads.size for n in keys.lengths]),
            (rules.QUERY_WIDTHS, query.total, query.lengths),
            (rules.KEY_WIDTHS, keys.total, keys.lengths),
        ):
            self.set_numbers(name, module, dict.fromkeys(attributes, full), lengths)

    def fused_attention(self, name: str, module: nn.Module) -> bool:
        """Attention with one linear for queries, keys and values: three segments for each rank."""
        for names in rules.FUSED_ATTENTIONS:
            into, out = part_of(module, names.into), part_of(module, names.out)
            count = number_of(module, rules.HEAD_COUNTS)
            if not (is_linear(into) and is_linear(out) and count):
                continue
            width = out.in_features
            if into.out_features != 3 * width or width % count or not all_known(module, (names.into, names.out)):
                continue
            if count < self.size:
                self.too_few.append(count)
                return True
            cut = even(width, self.size, unit=width // count)
            runs = [even_runs(count, self.size, width // count, third * width) for third in range(3)]
            self.columns(join(name, names.into), into, shards(0, 3 * width, runs))
            self.rows(join(name, names.out), out, cut)
            heads = [n // (width // count) for n in cut.lengths]
            self.set_numbers(name, module, dict.fromkeys(rules.HEAD_COUNTS, count), heads)
            self.attentions += 1
            return True
        return False

    def parallel_block(self, name: str, module: nn.Module) -> bool:
        """Attention and feed-forward side by side, whose outputs lie one behind the other before one linear."""
        for names in rules.PARALLEL_BLOCKS:
            attention, into, out = (part_of(module, n) for n in (names.attention, names.into, names.out))
            if attention is None or not (is_linear(into) and is_linear(out)):
                continue
            self.done.update(names_in(join(name, names.attention), attention))
            self.done.add(join(name, names.out))
            heads = read_heads(attention, rules.ATTENTIONS[0], out=False)
            width = getattr(module, names.width, None)
            if isinstance(heads, str) or not isinstance(width, int):
                return self._left_whole(name, heads if isinstance(heads, str) else f"it has no {names.width}")
            inner = heads.queries * heads.size
            gates = into.out_features // width
            if out.in_features != inner + width or into.out_features not in (width, 2 * width):
                return self._left_whole(name, f"{names.out} does not take attention and feed-forward side by side")
            if heads.keys < self.size:
                self.too_few.append(heads.keys)
                return self._left_whole(name, f"{heads.keys} heads cannot be dealt to {self.size}")
            self._cut_attention(join(name, names.attention), attention, rules.ATTENTIONS[0], heads)
            runs = [even_runs(width, self.size, offset=gate * width) for gate in range(gates)]
            self.columns(join(name, names.into), into, shards(0, gates * width, runs))
            query = even_runs(heads.queries, self.size, heads.size)
            self.rows(
                join(name, names.out),
                out,
                shards(1, inner + width, [query, even_runs(width, self.size, offset=inner)]),
            )
            self.set_numbers(name, module, {names.width: width}, even(width, self.size).lengths)
            return True
        return False

    def feed_forward(self, name: str, module: nn.Module) -> bool:
        """Two linears, or three with a gate, with something elementwise between them."""
        for names in rules.FEED_FORWARDS:
            out = part_of(module, names.out)
            into = [part_of(module, part) for part in names.into]
            fits = not names.classes or type(module).__name__ in names.classes
            if not (fits and is_linear(out) and all(is_linear(linear) for linear in into)):
                continue
            gates = 1
            if names.whole or names.halves:
                above = type(part_of(module, names.into[0].rpartition(".")[0])).__name__
                gates = 1 if above in names.whole else 2 if above in names.halves else 0
            width = out.in_features
            known = all_known(module, (*names.into, names.out, *rules.FEED_FORWARD_KEPT))
            if not known or width < self.size or any(linear.out_features != gates * width for linear in into):
                self._left_whole(name, "it is no plain feed-forward")
                return False
            cut = shards(0, gates * width, [even_runs(width, self.size, offset=g * width) for g in range(gates)])
            for part, linear in zip(names.into, into, strict=True):
                self.columns(join(name, part), linear, cut)
            self.rows(join(name, names.out), out, even(width, self.size))
            return True
        return False

    def sequence(self, name: str, module: nn.Module) -> bool:
        """A Sequential of two linears with elementwise activations around them."""
        if type(module) is not nn.Sequential:
            return False
        linears = [(part, child) for part, child in module.named_children() if is_linear(child)]
        others = [child for child in module.children() if not is_linear(child)]
        if len(linears) != 2 or not all(type(child).__name__ in rules.ELEMENTWISE for child in others):
            return False
        (first, into), (second, out) = cast(list[tuple[str, nn.Linear]], linears)
        if into.out_features != out.in_features or out.in_features < self.size:
            return False
        cut = even(out.in_features, self.size)
        self.columns(join(name, first), into, cut)
        self.rows(join(name, second), out, cut)
        return True

    def vocabulary(self, name: str, table: Any) -> None:
        """A large table: by rows, so that what a rank reads of the file is one run."""
        if table.num_embeddings >= max(rules.VOCABULARY, self.size) and table.max_norm is None and not table.sparse:
            cut = even(table.num_embeddings, self.size)
            self.tensors(name, table, cut)
            self.plan.roles[name] = Role("vocabulary", cut)

    # What the rules are made of.

    def columns(self, name: str, linear: Any, cut: Shards) -> None:
        """Cut a linear by its outputs."""
        self.tensors(name, linear, cut)
        self.set_numbers(name, linear, {"out_features": cut.total}, cut.lengths)

    def rows(self, name: str, linear: Any, cut: Shards) -> None:
        """Cut a linear by its inputs; its bias stays whole."""
        by_rows = Shards(1, cut.total, cut.ranks)
        self.plan.cuts[join(name, "weight")] = by_rows
        self.set_numbers(name, linear, {"in_features": cut.total}, cut.lengths)
        self.plan.roles[name] = Role("rows", by_rows)
        self.done.add(name)

    def gathered(self, name: str, linear: Any) -> None:
        """Cut a linear by its outputs, which are gathered."""
        if linear.out_features >= self.size:
            cut = even(linear.out_features, self.size)
            self.tensors(name, linear, cut)
            self.plan.roles[name] = Role("gathered", cut)

    def tensors(self, name: str, module: Any, cut: Shards) -> None:
        """Cut all parameters of a module along their first dimension."""
        for part, _ in module.named_parameters(recurse=False):
            self.plan.cuts[join(name, part)] = cut
        self.done.add(name)

    def set_numbers(self, name: str, module: nn.Module, full: dict[str, int], lengths: Sequence[int]) -> None:
        """Note the attributes of a module that hold the full numbers, to be set to a rank's own."""
        found = {key: tuple(lengths) for key, number in full.items() if vars(module).get(key) == number}
        if found:
            self.plan.attributes.setdefault(name, {}).update(found)

    def _left_whole(self, name: str, why: str) -> bool:
        self.plan.notes.append(f"{name} is whole on every rank: {why}")
        return True

    def agree_on_tied(self) -> None:
        """Shared modules are cut once; weights tied between two modules are cut only where both are cut alike.

        Raises UnsupportedError where a module could not be left whole by itself.
        """
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for tied in names.values():
            owners = {id(self.model.get_submodule(owner_of(name))): name for name in reversed(tied)}
            cuts = {self.plan.cuts.get(name) for name in owners.values()}
            if len(cuts) > 1:
                self._keep_whole(list(owners.values()))
            elif (cut := cuts.pop()) is not None:
                self.plan.cuts.update(dict.fromkeys(tied, cut))

    def _keep_whole(self, tied: list[str]) -> None:
        for name in tied:
            role = self.plan.roles.get(owner_of(name))
            if name in self.plan.cuts and (role is None or role.kind not in ("gathered", "vocabulary")):
                raise UnsupportedError(
                    f"tensor_parallel_size={self.size} does not fit {type(self.model).__name__}: {name} is tied to "
                    f"{next(other for other in tied if other != name)}, which is used in another way; use 1"
                )
            self.plan.cuts.pop(name, None)
            self.plan.roles.pop(owner_of(name), None)
            self._left_whole(name, "it is tied to a weight that is used in another way")
