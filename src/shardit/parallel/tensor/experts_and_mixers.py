"""Planning of modules that are neither attention nor plain feed-forward: experts, and mixers with states."""

from __future__ import annotations

from typing import Any

from torch import nn

from shardit.core.placement.slices import Shards, even, even_runs, one_behind_the_other, shards
from shardit.parallel.tensor import rules as rules
from shardit.parallel.tensor.heads import all_known, is_linear, join, names_in, part_of, present
from shardit.parallel.tensor.plan import Cutter, Role


def experts(cutter: Cutter, name: str, module: nn.Module) -> bool:
    """Cut experts that are parameters of one module, each by its hidden channels."""
    for names in cutter.family.experts:
        named = {key: getattr(names, key) for key in ("transposed", "halves", "biased", "gates", "normed")}
        flags = {key: getattr(module, flag, None) if isinstance(flag, str) else flag for key, flag in named.items()}
        if any(type(flag) is not bool for flag in flags.values()):
            continue
        if names.classes and type(module).__name__ not in names.classes:
            continue
        into = names.gated if flags["gates"] else names.plain
        expected = {into, names.out, *([into + names.bias, names.out + names.bias] if flags["biased"] else [])}
        if flags["normed"] or {n for n, _ in module.named_parameters()} != expected:
            return cutter.left_whole(name, "no rule matches one of its parts")
        side, gates = (1 if flags["transposed"] else 2), 1 + bool(flags["gates"])
        width = module.get_parameter(names.out).shape[side]
        if module.get_parameter(into).shape[3 - side] != gates * width or width < cutter.size:
            return cutter.left_whole(name, "sizes of its experts do not fit")
        own = even(width, cutter.parts)
        if flags["halves"]:
            runs = [even_runs(width, cutter.parts, offset=gate * width) for gate in range(gates)]
        else:
            runs = [even_runs(width, cutter.parts, unit=gates)]
        cuts = {into: (3 - side, runs), **({into + names.bias: (1, runs)} if flags["biased"] else {})}
        for part, (dim, found) in cuts.items():
            cutter.plan.cuts[join(name, part)] = shards(dim, gates * width, found)
        cutter.plan.cuts[join(name, names.out)] = Shards(side, width, own.ranks)
        once = (names.out + names.bias,) if flags["biased"] else ()
        cutter.plan.roles[name] = Role("sum", own, once)
        cutter.set_numbers(name, module, dict.fromkeys(names.widths, width), own.lengths)
        cutter.plan.units.append(name)
        cutter.done.update(names_in(name, module))
        return True
    return False


def channel_states(cutter: Cutter, name: str, module: nn.Module) -> bool:
    """Cut a mixer with a state for each channel."""
    for names in cutter.family.channel_states:
        if type(module).__name__ not in names.classes:
            continue
        width = vars(module).get(names.width)
        linears = [part_of(module, part) for part in (names.into, *names.sums)]
        if not isinstance(width, int) or width < cutter.size or not all(map(is_linear, linears)):
            return cutter.left_whole(name, "its linears are no plain ones")
        cut = even(width, cutter.parts)
        cutter.columns(join(name, names.into), linears[0], one_behind_the_other(cut, cut))
        for part in names.channels:
            _entries(cutter, name, module, part, cut)
        for part, linear in zip(names.sums, linears[1:], strict=True):
            cutter.rows(join(name, part), linear, cut)
        _convolution(cutter, join(name, names.channels[0]), part_of(module, names.channels[0]), cut)
        cutter.set_numbers(name, module, {names.width: width}, cut.lengths)
        cutter.plan.units.append(name)
        return True
    return False


def head_states(cutter: Cutter, name: str, module: nn.Module) -> bool:
    """Cut a mixer with a state for each head by groups of heads, or by heads if there is one group."""
    for names in cutter.family.head_states:
        if type(module).__name__ not in names.classes:
            continue
        count, groups, state, width, mixed = (
            int(vars(module).get(key) or 0)
            for key in (names.count, names.groups, names.state, names.width, names.mixed)
        )
        into, out, norm = (part_of(module, part) for part in (names.into, names.out, names.norm))
        fits = is_linear(into) and is_linear(out) and mixed == width + 2 * groups * state
        shape = (width,) if isinstance(norm, nn.Identity) else norm.weight.shape
        if not fits or into.out_features != width + mixed + count or shape != (width,):
            return cutter.left_whole(name, "its parts do not fit its heads")
        if not (cutter.size <= groups or (groups == 1 and cutter.size <= count)):
            return cutter.left_whole(
                name, f"{groups} groups of {count} heads cannot be divided among {cutter.size} ranks"
            )
        per_head = even(count, cutter.parts, unit=count // groups)
        channels = even(width, cutter.parts, unit=width // count * (count // groups))
        matrices = even(groups * state, cutter.parts, unit=state)
        if groups == 1:
            per_head, channels = even(count, cutter.parts), even(width, cutter.parts, unit=width // count)
            matrices = Shards(0, state, (((0, state),),) * cutter.size)
            if not isinstance(norm, nn.Identity):
                cutter.plan.roles[join(name, names.norm)] = Role("gated_norm", channels)
        convolved = one_behind_the_other(channels, matrices, matrices)
        all_outputs = one_behind_the_other(channels, convolved, per_head)
        cutter.columns(join(name, names.into), into, all_outputs)
        _scales(cutter, name, module, names, all_outputs)
        cutter.tensors(join(name, names.norm), norm, channels)
        cutter.rows(join(name, names.out), out, channels)
        _entries(cutter, name, module, names.convolution, convolved)
        _convolution(cutter, join(name, names.convolution), part_of(module, names.convolution), convolved)
        for part in names.heads:
            _entries(cutter, name, module, part, per_head)
        own_groups = [length // state for length in matrices.lengths]
        cutter.set_numbers(join(name, names.norm), norm, {names.groups: groups}, own_groups)
        for key, total, lengths in (
            (names.count, count, per_head.lengths),
            (names.groups, groups, own_groups),
            (names.width, width, channels.lengths),
            (names.mixed, mixed, convolved.lengths),
        ):
            cutter.set_numbers(name, module, {key: total}, lengths)
        cutter.plan.units.append(name)
        return True
    return False


def delta_states(cutter: Cutter, name: str, module: nn.Module) -> bool:
    """Cut linear attention with a state for each value head by key heads."""
    for names in cutter.family.delta_states:
        own = vars(module)
        attributes = (names.keys, names.values, names.key_size, names.value_size)
        keys, values, key_size, value_size = (int(own.get(key) or 0) for key in attributes)
        into = {part: part_of(module, part) for part in present(module, (*names.by_key, *names.mixed, *names.channels))}
        out, norm, convolution = (part_of(module, part) for part in (names.out, names.norm, names.convolution))
        if not (keys and values and key_size and value_size and into and out and norm and convolution):
            continue
        if keys < cutter.size or values % keys:
            return cutter.left_whole(name, f"{keys} key heads cannot be divided among {cutter.size} ranks")
        per_key, heads = even(keys, cutter.parts), even(values, cutter.parts, unit=values // keys)
        queries = even(keys * key_size, cutter.parts, unit=key_size)
        channels = even(values * value_size, cutter.parts, unit=values // keys * value_size)
        mixed = one_behind_the_other(queries, queries, channels)
        cuts = {
            part: even(into[part].out_features, cutter.parts, unit=into[part].out_features // keys) for part in into
        }
        cuts |= {part: mixed for part in (*names.mixed, names.convolution) if part_of(module, part) is not None}
        cuts |= {part: channels for part in names.channels if part in into}
        cuts |= {part: heads for part in names.by_value if hasattr(module, part)}
        if not _fits_heads(module, cuts, out, channels) or not all_known(module, (*cuts, names.out, names.norm)):
            return cutter.left_whole(name, "its parts do not fit its heads")
        for part, cut in cuts.items():
            _entries(cutter, name, module, part, cut)
        _convolution(cutter, join(name, names.convolution), convolution, mixed)
        cutter.rows(join(name, names.out), out, channels)
        cutter.done.update(names_in(join(name, names.norm), norm))
        counted = (names.keys, names.values, names.key_width, names.value_width, names.mixed_width)
        for key, cut in zip(counted, (per_key, heads, queries, channels, mixed), strict=True):
            cutter.set_numbers(name, module, {key: cut.total}, cut.lengths)
        cutter.plan.units.append(name)
        return True
    return False


def _fits_heads(module: nn.Module, cuts: dict[str, Shards], out: Any, channels: Shards) -> bool:
    """Return whether the parts of linear attention have the sizes of their cuts."""
    for part, cut in cuts.items():
        found: Any = getattr(module, part)
        length = len(found) if isinstance(found, nn.Parameter) else found.weight.shape[0]
        if length != cut.total or (isinstance(found, nn.Linear) and not is_linear(found)):
            return False
    return is_linear(out) and out.in_features == channels.total


def _scales(cutter: Cutter, name: str, module: nn.Module, names: rules.HeadStates, outputs: Shards) -> None:
    """Cut the factors of the outputs of a linear as these."""
    for part in names.scales:
        if (found := module._buffers.get(part)) is not None:
            cutter.plan.cuts[join(name, part)] = Shards(found.ndim - 1, outputs.total, outputs.ranks)


def _entries(cutter: Cutter, name: str, module: nn.Module, part: str, cut: Shards) -> None:
    """Cut a parameter, or those of a module, along the first dimension."""
    if part in module._parameters:
        cutter.plan.cuts[join(name, part)] = cut
    elif (found := part_of(module, part)) is not None:
        cutter.tensors(join(name, part), found, cut)
        cutter.set_numbers(join(name, part), found, {"out_features": cut.total}, cut.lengths)


def _convolution(cutter: Cutter, name: str, module: Any, cut: Shards) -> None:
    for key in ("in_channels", "out_channels", "groups"):
        cutter.set_numbers(name, module, {key: cut.total}, cut.lengths)
