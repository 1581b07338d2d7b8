"""What neither rules nor trials cut: the linears with most of it are cut by their outputs, which are gathered.

That is right for any linear, but sends more than a sum behind several of them.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from shardit.parallel.tensor.found.cut import Found, cut_as_found
from shardit.parallel.tensor.heads import is_linear, join
from shardit.parallel.tensor.plan import Cutter

TRIED = 5e-4
"""Share of a model's parameters from which on a module is tried."""

LEFT = 5e-3
"""Share of a model's parameters that may stay whole before further linears are gathered."""


def cut_rest(cutter: Cutter) -> None:
    """Cut what no rule has cut."""
    known: dict[Any, Found | None] = {}
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
    for found in sorted(kinds.values(), key=lambda one: -sum(linear.weight.numel() for _, linear in one)):
        if left <= LEFT * total:
            return
        for name, linear in found:
            cutter.gathered(name, linear)
            left -= sum(p.numel() for p in linear.parameters()) if name in cutter.done else 0
