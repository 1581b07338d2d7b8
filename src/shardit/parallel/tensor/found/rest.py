"""Parts that neither rules nor trials cut: their largest linears are cut by outputs, which are gathered.

That is right for any linear, but sends more than a sum behind several of them.
"""

from __future__ import annotations

import dis
import functools
import inspect
import re
from types import CodeType
from typing import Any

from torch import nn

from shardit.parallel.tensor.found.cut import ModuleCut, cut_as_found
from shardit.parallel.tensor.heads import is_linear, join
from shardit.parallel.tensor.plan import Cutter

TRIED = 5e-4
"""Share of a model's parameters from which on a module is tried."""

LEFT = 5e-3
"""Share of a model's parameters that may stay whole before further linears are gathered."""


FEWEST = 1 << 16
"""Fewest parameters of linears of one kind that are gathered: fewer need no memory."""


def cut_rest(cutter: Cutter) -> None:
    """Cut what no rule has cut."""
    known: dict[Any, ModuleCut | None] = {}
    modules = dict(cutter.model.named_modules())
    total = sum(parameter.numel() for parameter in cutter.model.parameters())
    for name, module in reversed(modules.items()):  # a part before the module around it
        if name in cutter.done or cutter.stays_whole(name) or _share(cutter, name, module) <= TRIED * total:
            continue
        if cut_as_found(cutter, name, module, known):
            cutter.forget_notes(name)
    for name in [name for name, tried in cutter.whole.items() if tried and name in modules]:
        if _share(cutter, name, modules[name]) <= TRIED * total:  # its parts were cut
            cutter.forget_notes(name)
    if cutter.plan.units:
        _gather(cutter, modules, total)


def _share(cutter: Cutter, name: str, module: nn.Module) -> int:
    """Return the number of parameters below a module that are not cut."""
    return sum(p.numel() for part, p in module.named_parameters() if join(name, part) not in cutter.plan.cuts)


def _gather(cutter: Cutter, modules: dict[str, nn.Module], total: int) -> None:
    """Gather the outputs of the largest linears, of each kind all or none, until little is left whole."""
    left = _share(cutter, "", cutter.model)
    kinds: dict[str, list[tuple[str, Any]]] = {}
    for name, module in modules.items():
        if is_linear(module) and name not in cutter.done and not cutter.stays_whole(name):
            kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append((name, module))
    sizes = {kind: sum(linear.weight.numel() for _, linear in found) for kind, found in kinds.items()}
    for kind in sorted(kinds, key=lambda one: -sizes[one]):
        if left <= LEFT * total or sizes[kind] < FEWEST:
            return
        for name, linear in kinds[kind]:
            if not _is_read(modules, name):
                cutter.gathered(name, linear)
                left -= sum(p.numel() for p in linear.parameters()) if name in cutter.done else 0


def _is_read(modules: dict[str, nn.Module], name: str) -> bool:
    """Return whether code of a module around a linear reads its weight itself, instead of calling the linear."""
    *above, last = name.split(".")
    return any(
        _names_weight(base, last)
        for depth in range(len(above) + 1)
        for base in type(modules[".".join(above[:depth])]).__mro__
    )


@functools.cache
def _names_weight(cls: type, last: str) -> bool:
    code = () if cls is nn.Module else vars(cls).items()
    methods = [held for name, held in code if inspect.isfunction(held) and not name.lstrip("_").startswith(SETTING_UP)]
    return any(_loads_weight(method.__code__, last) for method in methods)


def _loads_weight(code: CodeType, last: str) -> bool:
    """Return whether code takes `.last.weight` or `[last].weight`, for more than its dtype or device."""
    steps = [step for step in dis.get_instructions(code) if not step.opname.startswith(("CACHE", "BINARY_SUBSCR"))]
    for part, weight, then in zip(steps, steps[1:], [*steps[2:], steps[-1]], strict=False):
        if str(part.argval) == last and weight.argval in ("weight", "bias") and then.argval not in ("dtype", "device"):
            return True
    return any(_loads_weight(inner, last) for inner in code.co_consts if isinstance(inner, CodeType))


SETTING_UP = ("init", "reset")
"""Beginnings of names of methods that give weights their first values."""
