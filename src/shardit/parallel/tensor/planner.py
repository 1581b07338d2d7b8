"""Plans the cut of a model's parameters over the ranks of the tensor axis, from `rules` and a `Family`.

The scheme is that of Megatron-LM (Shoeybi et al., 2019): linears into heads or hidden channels by columns, linears out
of them by rows, one sum over the ranks behind each. If shapes and names do not fit a rule exactly, nothing is cut.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import Any, TypeVar, cast

from torch import nn

from shardit.core.modules.fingerprint import PROCESSOR
from shardit.core.placement.head_counts import check_heads, check_query_heads
from shardit.core.placement.slices import Parts, Shards, even, even_runs, one_behind_the_other, shards
from shardit.errors import UnsupportedError
from shardit.parallel.tensor import rules as rules
from shardit.parallel.tensor.check.kept import exposing_attribute
from shardit.parallel.tensor.experts_and_mixers import channel_states, delta_states, experts, head_states
from shardit.parallel.tensor.found.rest import cut_rest
from shardit.parallel.tensor.heads import (
    Heads,
    all_known,
    borrows,
    is_attention,
    is_linear,
    join,
    names_in,
    norm_size,
    number_of,
    part_of,
    present,
    read_fused_heads,
    read_heads,
    runs_as,
)
from shardit.parallel.tensor.plan import Cutter, NormPair, Role, TensorPlan
from shardit.parallel.tensor.processors import processor_parts
from shardit.parallel.tensor.rules import Family

Noted = TypeVar("Noted")
"""Entry of a table of a `Family` for a class."""


def plan_tensors(
    model: nn.Module, parts: Parts, family: Family, *, must_cut: bool = False, kept: Container[int] = ()
) -> TensorPlan:
    """Plan the cut of a whole model (on meta or not) into `parts`, one for each rank; the same on every rank.

    kept: ids of modules that stay whole because other components share them. must_cut: raise UnsupportedError if
    nothing can be cut, or if no attention has a head for every rank.
    """
    cutter = Cutter(model, parts, family)
    for name, module in model.named_modules():
        if name not in cutter.done and not _is_shared(cutter, name, module, kept):
            _visit(cutter, name, module)
    if family.tries:
        cut_rest(cutter)
    if must_cut and cutter.too_few and not cutter.attentions:
        _refuse_heads(cutter)
    cutter.agree_on_tied()
    cutter.check_borrowers()
    if must_cut and not cutter.plan.cuts:
        raise UnsupportedError(
            f"{type(model).__name__} has no attention or feed-forward that tensor parallelism knows; use "
            "tensor_parallel_size=1"
        )
    return cutter.plan


def _refuse_heads(cutter: Cutter) -> None:
    """Raise UnsupportedError with the possible numbers of ranks."""
    model, most = type(cutter.model).__name__, max(cutter.too_few, key=lambda heads: heads.queries)
    if not most.replicates or all(heads.queries == heads.keys for heads in cutter.too_few):
        check_heads(cutter.size, model, max(heads.keys for heads in cutter.too_few))
    others = [(heads.queries, heads.keys) for heads in cutter.too_few]
    check_query_heads(cutter.size, model, most.queries, most.keys, others)


def _is_shared(cutter: Cutter, name: str, module: nn.Module, kept: Container[int]) -> bool:
    if id(module) not in kept or not any(True for _ in module.parameters()):
        return False
    cutter.done.update(names_in(name, module))
    return cutter.left_whole(name, "another component has it, too")


def _visit(cutter: Cutter, name: str, module: Any) -> None:
    """Apply the first rule that matches a module."""
    if any(rule(cutter, name, module) for rule in _RULES):
        return
    if isinstance(module, nn.Embedding):
        cutter.vocabulary(name, module)
    elif any(re.search(pattern, name) for pattern in (*rules.GATHERED, *cutter.family.gathered)) and is_linear(module):
        cutter.gathered(name, module)


def _attention(cutter: Cutter, name: str, module: nn.Module) -> bool:
    """Cut attention by heads."""
    known = (*cutter.family.attentions, *rules.ATTENTIONS)
    names = next((n for n in known if is_attention(module, n)), None)
    if names is None:
        return _added_alone(cutter, name, module)
    if (why := _noted(cutter.family.kept_attentions, cutter.model)) is not None:
        return cutter.left_whole(name, why)
    cutter.plan.borrowers += [name] if borrows(module, names) else []
    heads = read_heads(module, names, cutter.family)
    if isinstance(heads, str):
        return cutter.left_whole(name, heads, tried=True)
    if not heads.fit(cutter.size):
        return cutter.has_too_few(name, heads)
    why = _cut_processor(cutter, name, module, heads)
    if why:
        return cutter.left_whole(name, why)
    _cut_attention(cutter, name, module, names, heads)
    if name not in cutter.plan.borrowers:
        cutter.plan.units.append(name)
    return True


def _added_alone(cutter: Cutter, name: str, module: nn.Module) -> bool:
    """Report attention with queries and keys under other names (for text alone, for example), which is left whole."""
    queries = [part for n in rules.ATTENTIONS[:2] for part in n.query if is_linear(part_of(module, part))]
    keys = [part for n in rules.ATTENTIONS[:2] for part in n.key_value if is_linear(part_of(module, part))]
    return bool(queries and keys) and cutter.left_whole(name, f"no rule matches attention with {', '.join(keys)} alone")


def _cut_processor(cutter: Cutter, name: str, module: nn.Module, heads: Heads) -> str | None:
    """Cut the linears of a processor that has some; return the reason if they, and so the attention, cannot be cut."""
    processor = getattr(module, PROCESSOR, None)
    if (why := _noted(cutter.family.kept_processors, processor)) is not None:
        return why
    if (key := exposing_attribute(processor, cutter.family)) is not None:
        return f"{type(processor).__name__} may expose its results for each head, in {key!r}"
    if not isinstance(processor, nn.Module):
        return None
    parts = processor_parts(processor, heads.query_shards(cutter.parts), heads.key_shards(cutter.parts))
    if isinstance(parts, str):
        return parts
    for part, cut in parts.items():
        act = cutter.rows if cut.dim == 1 else cutter.columns
        act(join(name, PROCESSOR, part), processor.get_submodule(part), Shards(0, cut.total, cut.ranks))
    return None


def _noted(kept: Mapping[str, Noted], thing: Any) -> Noted | None:
    """Return the entry in a table for the class of an object, or for one of its base classes."""
    return next((kept[base.__name__] for base in type(thing).__mro__ if base.__name__ in kept), None)


def _cut_attention(cutter: Cutter, name: str, module: nn.Module, names: rules.Attention, heads: Heads) -> None:
    query, keys = heads.query_shards(cutter.parts), heads.key_shards(cutter.parts)
    for part in present(module, names.query):
        cut = heads.gated_query_shards(cutter.parts) if part == names.query[0] else query
        cutter.columns(join(name, part), part_of(module, part), cut)
    for part in present(module, names.key_value):
        cutter.columns(join(name, part), part_of(module, part), keys)
    for part in present(module, names.out):
        if isinstance(part_of(module, part), nn.Linear):
            cutter.rows(join(name, part), part_of(module, part), query)
    for parts, cut in ((names.query_norms, query), (names.key_norms, keys)):
        for part in present(module, parts):
            if norm_size(part_of(module, part)) == cut.total != heads.size:
                cutter.tensors(join(name, part), part_of(module, part), cut)
                cutter.plan.roles[join(name, part)] = Role("norm", cut)
    norms = [join(name, parts[0]) for parts in (names.query_norms, names.key_norms) if parts]
    if len(norms) == 2 and all(norm in cutter.plan.roles for norm in norms):
        cutter.plan.pairs.append(NormPair(norms[0], join(name, names.key_value[0]), norms[1]))
    for part in present(module, names.per_head):
        table = part_of(module, part)
        cut = even(heads.queries, cutter.parts, dim=1)
        cutter.plan.cuts[join(name, f"{part}.weight")] = cut
        cutter.set_numbers(join(name, part), table, {"embedding_dim": heads.queries}, cut.lengths)
        cutter.done.add(join(name, part))
    for part in names.head_vectors:
        if part in module._parameters:
            cutter.plan.cuts[join(name, part)] = _by_head(query, heads.size)
    for part in present(module, names.head_gates):
        cutter.columns(join(name, part), part_of(module, part), _by_head(query, heads.size))
    tables = _noted(cutter.family.head_tables, cutter.model) or ()
    alone = any(part_of(module, into) is not None and part_of(module, out) is None for into, out in names.second)
    alone = alone or type(getattr(module, PROCESSOR, None)).__name__ in cutter.family.head_outputs
    if tables or alone:
        cutter.plan.roles[name] = Role("heads", query, tables=tables, head=heads.size, alone=alone)
    more = _noted(cutter.family.head_widths, getattr(module, PROCESSOR, None)) or ()
    cutter.set_numbers(name, module, dict.fromkeys(more, query.total), query.lengths)
    _set_heads(cutter, name, module, heads)
    cutter.attentions += 1


def _by_head(cut: Shards, size: int) -> Shards:
    """Return the cut of heads for a cut of their channels."""
    ranks = tuple(tuple((start // size, length // size) for start, length in segments) for segments in cut.ranks)
    return Shards(0, cut.total // size, ranks)


def _set_heads(cutter: Cutter, name: str, module: nn.Module, heads: Heads, more: tuple[str, ...] = ()) -> None:
    query, keys = heads.query_shards(cutter.parts), heads.key_shards(cutter.parts)
    for attributes, full, lengths in (
        ((*rules.HEAD_COUNTS, *more), heads.queries, [n // heads.size for n in query.lengths]),
        (rules.KEY_HEAD_COUNTS, heads.keys, [n // heads.size for n in keys.lengths]),
        (rules.QUERY_WIDTHS, query.total, query.lengths),
        (rules.KEY_WIDTHS, keys.total, keys.lengths),
        (rules.KEY_GROUPS, heads.queries // heads.keys, heads.groups(cutter.parts)),
    ):
        cutter.set_numbers(name, module, dict.fromkeys(attributes, full), lengths)


def _fused_attention(cutter: Cutter, name: str, module: nn.Module) -> bool:
    """Cut attention with one linear for queries, keys and values: a segment of each for every rank."""
    for names in cutter.family.fused_attentions:
        into, out = part_of(module, names.into), part_of(module, names.out)
        if not (type(module).__name__ in names.classes and is_linear(into) and is_linear(out)):
            continue
        heads = read_fused_heads(module, names, cutter.family)
        if heads is None or not all_known(module, (names.into, names.out)):
            continue
        if not heads.fit(cutter.size):
            return cutter.has_too_few(name, heads)
        query, keys = heads.query_shards(cutter.parts), heads.key_shards(cutter.parts)
        if names.by_head:
            cut = even(3 * query.total, cutter.parts, unit=3 * heads.size)
        else:
            cut = one_behind_the_other(query, keys, keys)
        cutter.columns(join(name, names.into), into, cut)
        cutter.rows(join(name, names.out), out, query)
        _set_heads(cutter, name, module, heads, names.numbers)
        cutter.attentions += 1
        cutter.plan.units.append(name)
        return True
    return False


def _latent_attention(cutter: Cutter, name: str, module: nn.Module) -> bool:
    """Cut attention with keys and values from a latent by heads."""
    for names in cutter.family.latent_attentions:
        count, out = number_of(module, (names.count,)), part_of(module, names.out)
        into = {part: part_of(module, part) for part in present(module, names.into)}
        if names.into[-1] not in into or not count:
            continue
        if not all(map(is_linear, (out, *into.values()))) or not all_known(
            module, (*names.into, names.out, *names.kept)
        ):
            return cutter.left_whole(name, "no rule matches one of its parts")
        widths = [out.in_features, *(linear.out_features for linear in into.values())]
        if count < cutter.size or any(width % count for width in widths):
            return cutter.left_whole(name, f"{count} heads cannot be divided among {cutter.size} ranks")
        for part, linear in into.items():
            width = linear.out_features
            cutter.columns(join(name, part), linear, even(width, cutter.parts, unit=width // count))
        cutter.rows(join(name, names.out), out, even(out.in_features, cutter.parts, unit=out.in_features // count))
        cutter.set_numbers(name, module, {names.count: count}, even(count, cutter.parts).lengths)
        cutter.attentions += 1
        cutter.plan.units.append(name)
        return True
    return False


def _parallel_block(cutter: Cutter, name: str, module: nn.Module) -> bool:
    """Cut a block with attention and feed-forward side by side, whose outputs are concatenated before one linear."""
    for names in cutter.family.parallel_blocks:
        attention, into, out = (part_of(module, n) for n in (names.attention, names.into, names.out))
        if attention is None or not (is_linear(into) and is_linear(out)):
            continue
        cutter.done.update(names_in(join(name, names.attention), attention))
        cutter.done.add(join(name, names.out))
        if type(module).__name__ not in names.classes:
            return cutter.left_whole(name, "whether attention or feed-forward comes first is not known")
        heads = read_heads(attention, rules.ATTENTIONS[0], cutter.family, out=False)
        if isinstance(heads, str):
            return cutter.left_whole(name, heads)
        inner = heads.queries * heads.size
        width = vars(module).get(names.width, into.out_features)
        gates = into.out_features // width
        if out.in_features != inner + width or into.out_features not in (width, 2 * width):
            return cutter.left_whole(name, f"{names.out} does not take attention and feed-forward side by side")
        if not heads.fit(cutter.size):
            return cutter.has_too_few(name, heads)
        why = _cut_processor(cutter, join(name, names.attention), attention, heads)
        if why:
            return cutter.left_whole(name, why)
        _cut_attention(cutter, join(name, names.attention), attention, rules.ATTENTIONS[0], heads)
        runs = [even_runs(width, cutter.parts, offset=gate * width) for gate in range(gates)]
        cutter.columns(join(name, names.into), into, shards(0, gates * width, runs))
        heads_first = [run for (run,) in heads.query_shards(cutter.parts).ranks]
        rows = shards(1, inner + width, [heads_first, even_runs(width, cutter.parts, offset=inner)])
        cutter.rows(join(name, names.out), out, rows)
        cutter.set_numbers(name, module, {names.width: width}, even(width, cutter.parts).lengths)
        cutter.plan.units.append(name)
        return True
    return False


def _feed_forward(cutter: Cutter, name: str, module: nn.Module) -> bool:
    """Cut two linears, or three with a gate, with elementwise operations between them."""
    for names in (*cutter.family.feed_forwards, *rules.FEED_FORWARDS):
        out = part_of(module, names.out)
        into = [part_of(module, part) for part in names.into]
        fits = not names.classes or type(module).__name__ in names.classes
        if not (fits and is_linear(out) and all(is_linear(linear) for linear in into)):
            continue
        gates = names.gates
        if names.whole or names.halves:
            above = part_of(module, names.into[0].rpartition(".")[0])
            gates = 2 if any(runs_as(above, known) for known in names.halves) else 0
            gates = 1 if any(runs_as(above, known) for known in names.whole) else gates
        width = out.in_features
        known = all_known(module, (*names.into, names.out, *rules.FEED_FORWARD_KEPT))
        if not known or width < cutter.size or any(linear.out_features != gates * width for linear in into):
            cutter.left_whole(name, "it is no plain feed-forward", tried=True)
            return False
        cut = shards(0, gates * width, [even_runs(width, cutter.parts, offset=g * width) for g in range(gates)])
        for part, linear in zip(names.into, into, strict=True):
            cutter.columns(join(name, part), linear, cut)
        cutter.rows(join(name, names.out), out, even(width, cutter.parts))
        cutter.plan.units.append(name)
        return True
    return False


def _sequence(cutter: Cutter, name: str, module: nn.Module) -> bool:
    """Cut a Sequential of two linears with elementwise activations around them."""
    if type(module) is not nn.Sequential:
        return False
    linears = [(part, child) for part, child in module.named_children() if is_linear(child)]
    others = [child for child in module.children() if not is_linear(child)]
    if len(linears) != 2 or not all(any(runs_as(child, known) for known in rules.ELEMENTWISE) for child in others):
        return False
    (first, into), (second, out) = cast(list[tuple[str, nn.Linear]], linears)
    if into.out_features != out.in_features or out.in_features < cutter.size:
        return False
    cut = even(out.in_features, cutter.parts)
    cutter.columns(join(name, first), into, cut)
    cutter.rows(join(name, second), out, cut)
    cutter.plan.units.append(name)
    return True


_RULES = (
    *(_parallel_block, _latent_attention, _attention, _fused_attention),
    *(experts, channel_states, head_states, delta_states, _feed_forward, _sequence),
)
"""Each returns whether it has matched the module."""
