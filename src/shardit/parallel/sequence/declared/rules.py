"""Reads a declared sequence plan: rules for modules, checked against the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from shardit.errors import InputError, did_you_mean
from shardit.sp_plan import SequenceParallelInput, SequenceParallelOutput

DECLARED, OF_DIFFUSERS = "_sp_plan", "_cp_plan"
"""Attributes of a model with a plan: the one that replaces the found plan, and the fallback if nothing is found."""


@dataclass(frozen=True)
class Rule:
    """The rule for one tensor. title: for errors. lenient: a tensor of other than `dims` dimensions is left alone
    instead of refused, as in plans of diffusers. repeated: several modules get the same tensor, so its shard is
    cached."""

    title: str
    dim: int
    dims: int | None = None
    pad: bool = False
    lenient: bool = False
    repeated: bool = False


@dataclass
class ModuleRules:
    """The rules for one module. inputs: by parameter name; a tuple for lists of tensors. outputs: by number. gathers:
    by position, None if an output is left alone. positions: place of each parameter in a call. where: name of the plan,
    for errors."""

    where: str
    title: str
    module: nn.Module
    positions: dict[str, int]
    inputs: dict[str, Rule | tuple[Rule, ...]] = field(default_factory=dict)
    outputs: dict[int, Rule] = field(default_factory=dict)
    gathers: tuple[Rule | None, ...] | None = None

    def splits(self) -> Iterable[Rule]:
        """Yield all rules for tensors to split."""
        for rule in self.inputs.values():
            yield from rule if isinstance(rule, tuple) else (rule,)
        yield from self.outputs.values()


def read_plan(model: nn.Module, attribute: str, padding: bool) -> list[ModuleRules]:
    """Return the rules of the plan in an attribute of a model, one entry for each module in it.

    padding: whether auto_pad is supported. Raises InputError, with the valid names, if the plan and the model do not
    fit: unknown modules and parameters, and values that contradict their keys.
    """
    plan, name = getattr(model, attribute), type(model).__name__
    where = f"{name}.{attribute}"
    if not isinstance(plan, Mapping):
        raise InputError(f"{where} must be a dict of module names, got {type(plan).__name__}")
    found: dict[int, ModuleRules] = {}
    for key, entry in plan.items():
        if not isinstance(key, str):
            raise InputError(f'{where}: {key!r} is no module name; "" is the model itself')
        if attribute == OF_DIFFUSERS and _beyond_a_list(model, key):
            continue  # written for a configuration with more blocks
        modules = list(_find(model, key, f"{where}: {key!r}"))
        for path, module in modules:
            rules = found.setdefault(id(module), ModuleRules(where, path or name, module, _positions(module)))
            _add(rules, entry, f"{where}[{key!r}]", len(modules) > 1)
    if not padding:
        for rule in (r for rules in found.values() for r in rules.splits()):
            if rule.pad:
                raise InputError(
                    f"{where}: auto_pad ({rule.title}) works with Ulysses only: set ring_degree=1, or leave auto_pad "
                    "out (lengths need not divide)"
                )
    return list(found.values())


def _find(model: nn.Module, key: str, where: str) -> Iterable[tuple[str, nn.Module]]:
    """Yield the modules that a key matches, with their own names."""
    found = [("", model)]
    for atom in key.split(".") if key else []:
        below: list[tuple[str, nn.Module]] = []
        for path, module in found:
            if atom == "*":
                if not isinstance(module, nn.ModuleList):
                    raise InputError(f"{where}: '*' stands for the elements of a ModuleList, not {_what(path, module)}")
                children: Any = list(module.named_children())
            else:
                known = dict(module.named_children())
                if atom not in known:
                    raise InputError(
                        f"{where}: there is no {atom!r} in {_what(path, module)}{did_you_mean(atom, known)}; it has "
                        f"{_some(known)}"
                    )
                children = [(atom, known[atom])]
            below += [(f"{path}.{n}" if path else n, child) for n, child in children]
        found = below
    return found


def _beyond_a_list(model: nn.Module, key: str) -> bool:
    """Return whether a key names an element after the last one of a ModuleList."""
    module: Any = model
    for atom in key.split("."):
        if isinstance(module, nn.ModuleList) and atom.isdecimal() and int(atom) >= len(module):
            return True
        module = dict(module.named_children()).get(atom)
        if module is None:
            return False
    return False


def _what(path: str, module: nn.Module) -> str:
    kind = type(module).__name__
    return f"{path} ({kind})" if path else kind


def _some(names: Iterable[str]) -> str:
    names = list(names)
    shown = names if len(names) <= 12 else [*names[:5], "...", names[-1]]
    return ", ".join(shown) or "no modules"


def _positions(module: nn.Module) -> dict[str, int]:
    """Return the place of each parameter of the module's forward; -1 under "**" if it takes any name."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    positions = {p.name: i for i, p in enumerate(parameters) if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        positions["**"] = -1
    return positions


def _add(rules: ModuleRules, entry: Any, where: str, repeated: bool) -> None:
    """Add an entry of a plan to the rules of its module."""
    if isinstance(entry, Mapping):
        for key, value in entry.items():
            if isinstance(key, int) and not isinstance(key, bool):
                rules.outputs[key] = _output(rules, key, value, where)
            elif isinstance(key, str):
                rules.inputs[key] = _input(rules, key, value, where, repeated)
            else:
                raise InputError(f"{where}: {key!r} is neither a parameter name nor the number of an output")
        return
    several = isinstance(entry, (list, tuple))
    entries: list[Any] = list(entry) if several else [entry]
    gathers = []
    for number, value in enumerate(entries):
        if value is not None and _kind(value) != "output":
            raise InputError(
                f"{where} must be a dict of inputs, or SequenceParallelOutput (a list for several), got {value!r}"
            )
        title = f"output {number} of {rules.title}" if several else f"the output of {rules.title}"
        gathers.append(None if value is None else _rule(rules, title, value.gather_dim, value))
    rules.gathers = tuple(gathers)


def _input(rules: ModuleRules, key: str, value: Any, where: str, repeated: bool) -> Rule | tuple[Rule, ...]:
    if key not in rules.positions and "**" not in rules.positions:
        known = list(rules.positions)
        raise InputError(
            f"{where}: {type(rules.module).__name__} takes no {key!r}{did_you_mean(key, known)}; it takes "
            f"{', '.join(known)}"
        )
    several = isinstance(value, (list, tuple))
    entries: list[Any] = list(value) if several else [value]
    made = []
    for number, entry in enumerate(entries):
        if _kind(entry) != "input":
            raise InputError(f"{where}: {key!r} needs a SequenceParallelInput, got {entry!r}")
        if entry.split_output:
            raise InputError(
                f"{where}: {key!r} is a parameter, but has split_output=True; outputs have numbers as keys"
            )
        title = f"{key} of {rules.title}" if not several else f"{key}[{number}] of {rules.title}"
        made.append(_rule(rules, title, entry.split_dim, entry, repeated))
    return tuple(made) if several else made[0]


def _output(rules: ModuleRules, key: int, value: Any, where: str) -> Rule:
    if _kind(value) != "input":
        raise InputError(f"{where}: {key} needs a SequenceParallelInput, got {value!r}")
    if not value.split_output:
        raise InputError(f"{where}: {key} is the number of an output, so it needs split_output=True")
    if key < 0:
        raise InputError(f"{where}: outputs are counted from 0, got {key}")
    return _rule(rules, f"output {key} of {rules.title}", value.split_dim, value)


def _kind(value: Any) -> str | None:
    """Return whether an entry of a plan, ours or diffusers', splits ("input") or gathers ("output")."""
    if isinstance(value, SequenceParallelInput) or type(value).__name__ == "ContextParallelInput":
        return "input"
    if isinstance(value, SequenceParallelOutput) or type(value).__name__ == "ContextParallelOutput":
        return "output"
    return None


def _rule(rules: ModuleRules, title: str, dim: int, entry: Any, repeated: bool = False) -> Rule:
    title = f"{rules.where}: {title}"
    lenient = not isinstance(entry, (SequenceParallelInput, SequenceParallelOutput))
    return Rule(title, dim, entry.expected_dims, getattr(entry, "auto_pad", False), lenient, repeated)
