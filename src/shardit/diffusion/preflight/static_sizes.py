"""Finds the heights and widths that a pipeline takes in its source and in the configurations of its components.

`size_multiples` tries the loaded pipeline, and so finds more; results that both find are equal.
"""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from shardit.diffusion.loading.diffusers_source import init_defaults, lineage, method
from shardit.diffusion.request.size_search import SIDES, found_least_sides, search
from shardit.loading.index import Component, read_config

_PLAIN = {"getattr": getattr, "hasattr": hasattr, "len": len, "sum": sum, "max": max, "min": min}
_CHECKS = ("check_inputs",)
_SIDES = frozenset(SIDES)

Check = tuple[ast.expr, dict[str, Any]]


def static_sizes(
    class_name: str, arguments: Container[str], configs: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, int]]:
    """Return the `multiples` that the installed diffusers' class of that name requires of height and width, and their
    `least` values; {} if its source does not show them. arguments: those of its call. configs: the configurations of
    its components, by name."""
    nodes = list(lineage(class_name))
    made = _attributes(nodes, configs)
    checks = list(_checks(nodes, "__call__", made))
    multiples = search(lambda height, width: not any(_refuses(check, made, height, width) for check in checks))
    return {"multiples": multiples, "least": found_least_sides(vars(made), arguments)}


def configs_in(parts: Mapping[str, Component]) -> dict[str, dict[str, Any]]:
    """Return the configurations of the components of a folder, by name."""
    read = {name: read_config(part) for name, part in parts.items()}
    return {name: with_defaults(str(parts[name].class_name), one) for name, one in read.items() if one is not None}


def layers_in(configs: Mapping[str, Mapping[str, Any]]) -> list[int]:
    """Return the numbers of layers of the text encoders, from the configurations of the components."""
    numbers = (one.get("num_hidden_layers") for name, one in configs.items() if name.startswith("text_encoder"))
    return [number for number in numbers if isinstance(number, int)]


def with_defaults(class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a component's configuration with the defaults of its class."""
    return {**init_defaults(class_name), **config}


def _attributes(nodes: list[ast.ClassDef], configs: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return the pipeline's object, as far as its `__init__` computes plain values from configurations."""
    made = SimpleNamespace(
        **{name: SimpleNamespace(**{**config, "config": SimpleNamespace(**config)}) for name, config in configs.items()}
    )
    init = next(filter(None, (method(node, "__init__") for node in nodes)), None)
    for line in [] if init is None else init.body:
        if isinstance(line, ast.Assign) and isinstance(target := line.targets[0], ast.Attribute):
            if target.attr.endswith("_processor") and isinstance(line.value, ast.Call):
                given = {word.arg: _value(word.value, {"self": made}) for word in line.value.keywords if word.arg}
                setattr(made, target.attr, SimpleNamespace(config=SimpleNamespace(**given)))
                continue
            value = _value(line.value, {"self": made})
            if isinstance(value, (int, float)):
                setattr(made, target.attr, value)
    return made


def _checks(nodes: list[ast.ClassDef], name: str, made: Any, seen: frozenset[str] = frozenset()) -> Iterator[Check]:
    """Yield the conditions on height and width under which a method raises, until it changes one of them; each with the
    plain values computed before. Includes the conditions of called methods in _CHECKS."""
    function = next(filter(None, (method(node, name) for node in nodes)), None)
    known: dict[str, Any] = {}
    for line in [] if function is None else function.body:
        if isinstance(line, ast.Assign) and isinstance(target := line.targets[0], ast.Name):
            value = _value(line.value, {"self": made, **known})
            if isinstance(value, (int, float)):
                known[target.id] = value
        names = [node for node in ast.walk(line) if isinstance(node, ast.Name) and node.id in _SIDES]
        if isinstance(line, ast.If) and isinstance(line.body[-1], ast.Raise) and names:
            yield line.test, dict(known)
        elif any(isinstance(node.ctx, ast.Store) for node in names) and not _is_default(line):
            return
        for call in (node.attr for node in ast.walk(line) if isinstance(node, ast.Attribute)):
            if call in _CHECKS and call not in seen:
                yield from _checks(nodes, call, made, seen | {call})


def _is_default(line: ast.stmt) -> bool:
    """Return whether a statement only sets a side that was not given."""
    text = ast.unparse(line)
    forms = ("{0} = {0} or ", "if {0} is None", "if not {0} ")
    return any(form.format(side) in text for form in forms for side in _SIDES)


def _refuses(check: Check, made: Any, height: int, width: int) -> bool:
    test, known = check
    return bool(_value(test, {"self": made, **known, "height": height, "width": width}))


def _value(expression: ast.expr, names: dict[str, Any]) -> Any:
    """Return the value of an expression of diffusers, None if it needs more than the known names."""
    code = compile(ast.Expression(expression), "diffusers", "eval")
    try:
        return eval(code, {"__builtins__": _PLAIN}, names)
    except Exception:  # of any kind: most expressions need a loaded pipeline
        return None
