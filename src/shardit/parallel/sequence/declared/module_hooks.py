"""Intercepts modules in a declared plan: splits inputs before the forward, splits or gathers outputs after it.

Types and dimensions are only known here, at a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shardit.errors import InputError
from shardit.parallel.sequence.declared.passes import Pass
from shardit.parallel.sequence.declared.rules import ModuleRules, Rule

Act = Callable[[Rule, torch.Tensor], torch.Tensor]


def call_module(
    how: Pass, rules: ModuleRules, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a call of a module under its rules. Raises InputError if its arguments or outputs do not fit them."""
    given, named = list(args), dict(kwargs)
    for name, rule in rules.inputs.items():
        place = rules.positions.get(name, -1)
        if name in named:
            named[name] = _apply(how.split, rule, named[name])
        elif 0 <= place < len(given):
            given[place] = _apply(how.split, rule, given[place])
    out = call(*given, **named)
    return _outputs(how, rules, out) if rules.outputs or rules.gathers else out


def _apply(act: Act, rule: Rule | tuple[Rule, ...] | None, value: Any) -> Any:
    if value is None or rule is None:
        return value
    if isinstance(rule, tuple):
        if not isinstance(value, (list, tuple)) or len(value) != len(rule):
            raise InputError(f"{rule[0].title}: its plan is for a list of {len(rule)} tensors")
        return type(value)(_apply(act, r, v) for r, v in zip(rule, value, strict=True))
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{rule.title} is no tensor but {type(value).__name__}")
    if rule.dims is not None and value.ndim != rule.dims:
        if rule.lenient:
            return value
        raise InputError(f"{rule.title} has {value.ndim} dimensions, but expected_dims={rule.dims}")
    if not -value.ndim <= rule.dim < value.ndim:
        raise InputError(f"{rule.title} has {value.ndim} dimensions, so it cannot be cut at dimension {rule.dim}")
    return act(rule, value)


def _outputs(how: Pass, rules: ModuleRules, out: Any) -> Any:
    if isinstance(out, torch.Tensor):
        return _each(how, rules, [out])[0]
    if isinstance(out, (list, tuple)):
        made = _each(how, rules, list(out))
        return type(out)(*made) if hasattr(out, "_fields") else type(out)(made)
    if isinstance(out, dict):  # an output class of diffusers, too
        for key, value in zip(list(out), _each(how, rules, list(out.values())), strict=True):
            out[key] = value
        return out
    raise InputError(f"{rules.where}: {rules.title} returns {type(out).__name__}, which cannot be split")


def _each(how: Pass, rules: ModuleRules, outs: list[Any]) -> list[Any]:
    for number, rule in rules.outputs.items():
        if number >= len(outs):
            raise InputError(f"{rules.where}: there is no output {number} of {rules.title}, it returns {len(outs)}")
        outs[number] = _apply(how.split, rule, outs[number])
    gathers = rules.gathers or ()
    if len(gathers) > len(outs):
        raise InputError(f"{rules.where}: {rules.title} returns {len(outs)} outputs, not {len(gathers)}")
    for number, rule in enumerate(gathers):
        outs[number] = _apply(how.gather, rule, outs[number])
    return outs
