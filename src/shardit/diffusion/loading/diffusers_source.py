"""Classes of the installed diffusers, read from its source: importing diffusers and torch takes seconds."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shardit.diffusion.class_homes import CUT_PACKAGES

_NAME = re.compile(rb"\w+")
_NOT_PLAIN = object()
"""Stands for a default that is not a literal."""


def folder(name: str = "") -> Path | None:
    """Return a folder of the package ("" is the package itself), None if diffusers is not installed."""
    package = importlib.util.find_spec("diffusers")
    if package is None or not package.submodule_search_locations:
        return None
    return Path(package.submodule_search_locations[0]) / name


def definition(name: str, within: str = "pipelines") -> ast.ClassDef | None:
    """Return the definition of a class anywhere in a folder of diffusers, None if there is none."""
    found = _found(name, within)
    return None if found is None else found[0]


def module_of(pipeline: str) -> str:
    """Return the source of the module that defines a pipeline class; "" if there is none."""
    found = _found(pipeline, "pipelines")
    return "" if found is None else found[1].decode()


def _found(name: str, within: str) -> tuple[ast.ClassDef, bytes] | None:
    file = _homes(within).get(name)
    if file is None:
        return None
    classes, source = _module(file)
    return (classes[name], source) if name in classes else None


@functools.lru_cache(maxsize=4)
def _homes(within: str) -> dict[str, Path]:
    """Return the modules that define the classes in a folder of diffusers and its subfolders, by class."""
    root, found = folder(within), dict[str, Path]()
    for file in [] if root is None else sorted(root.rglob("*.py")):
        for text in file.read_bytes().split(b"\nclass ")[1:]:
            if name := _NAME.match(text):
                found.setdefault(name[0].decode(), file)
    return found


@functools.lru_cache(maxsize=256)
def _module(file: Path) -> tuple[dict[str, ast.ClassDef], bytes]:
    """Return the classes at the top level of a module, and its source."""
    source = file.read_bytes()
    return {node.name: node for node in _classes(source)}, source


@functools.lru_cache(maxsize=4)
def definitions(within: str) -> dict[str, ast.ClassDef]:
    """Return all classes at the top level of the modules in a folder of diffusers, without its subfolders."""
    root = folder(within)
    files = [] if root is None else sorted(root.glob("*.py"))
    return {name: node for file in files for name, node in _module(file)[0].items()}


def definitions_in(file: Path) -> Iterable[ast.ClassDef]:
    """Return the classes at the top level of a module."""
    return _module(file)[0].values()


def _classes(source: bytes) -> Iterator[ast.ClassDef]:
    return (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))


def is_exported(name: str) -> bool:
    """Return whether diffusers may export a name: its `__init__.py` lists all names as texts."""
    package = folder()
    return package is not None and f'"{name}"' in (package / "__init__.py").read_text(encoding="utf-8")


def bases(node: ast.ClassDef) -> list[str]:
    """Return the bases that are plain names."""
    return [base.id for base in node.bases if isinstance(base, ast.Name)]


def lineage(name: str) -> Iterator[ast.ClassDef]:
    """Yield a pipeline class, then the first base that is also a pipeline, and so on."""
    node = definition(name)
    while node is not None:
        yield node
        node = next((found for found in map(definition, bases(node)) if found is not None), None)


def method(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    """Return the method that a class defines itself, None if it does not."""
    return next((x for x in node.body if isinstance(x, ast.FunctionDef) and x.name == name), None)


def refused_above(name: str, layers: Collection[int] = ()) -> dict[str, int]:
    """Return the largest values of arguments above which a pipeline class of diffusers raises, as in
    `if max_sequence_length is not None and max_sequence_length > 512: raise ...`. layers: numbers of layers of the text
    encoders, whose states `clip_skip` counts from the end."""
    nodes = list(lineage(name))
    found: dict[str, int] = {}
    if layers and (skipped := _SKIPPED.search(module_of(name))):
        found["clip_skip"] = min(layers) + 1 - int(skipped[1])
    for checks in ("check_inputs", "__call__"):
        function = next(filter(None, (method(node, checks) for node in nodes)), None)
        for line in [] if function is None else function.body:
            if isinstance(line, ast.If) and isinstance(line.body[-1], ast.Raise):
                limit = _LIMIT.fullmatch(ast.unparse(line.test))
                if limit is not None and limit[1] in (None, limit[2]):
                    found.setdefault(limit[2], int(limit[3]))
    return found


def refused_without(name: str, config: Mapping[str, Any]) -> list[str]:
    """Return the arguments that a pipeline class of diffusers refuses with this configuration, as in
    `if self.config.boundary_ratio is None and guidance_scale_2 is not None: raise ...`."""
    given = {**{item.name: item.default for item in init_parameters(name).values()}, **config}
    checks = next(filter(None, (method(node, "check_inputs") for node in lineage(name))), None)
    tests = [ast.unparse(line.test) for line in (checks.body if checks else ()) if isinstance(line, ast.If)]
    return [needed[2] for needed in filter(None, map(_NEEDED.fullmatch, tests)) if given.get(needed[1]) is None]


_NEEDED = re.compile(r"self\.config\.(\w+) is None and (\w+) is not None")
_SKIPPED = re.compile(r"\[-\(clip_skip \+ (\d)\)\]")
_LIMIT = re.compile(r"(?:(\w+) is not None and )?(\w+) > (\d+)")


def assigned(node: ast.ClassDef, name: str) -> ast.expr | None:
    """Return the value that a class assigns to one of its attributes."""
    for line in node.body:
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return getattr(line, "value", None)
    return None


def parameters(arguments: ast.arguments) -> Iterator[inspect.Parameter]:
    """Yield the parameters of a function, with annotations as text."""
    kind = inspect.Parameter
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    for item, default in zip(positional, defaults, strict=True):
        yield _parameter(item, kind.POSITIONAL_OR_KEYWORD, default)
    if arguments.vararg is not None:
        yield kind(arguments.vararg.arg, kind.VAR_POSITIONAL)
    for item, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _parameter(item, kind.KEYWORD_ONLY, default)
    if arguments.kwarg is not None:
        yield kind(arguments.kwarg.arg, kind.VAR_KEYWORD)


def parameters_of(node: ast.ClassDef, name: str) -> dict[str, inspect.Parameter]:
    """Return the parameters of a method that a class defines itself, by name; {} if it does not."""
    found = method(node, name)
    return {} if found is None else {item.name: item for item in parameters(found.args)}


def _parameter(item: ast.arg, kind: Any, default: ast.expr | None) -> inspect.Parameter:
    annotation = inspect.Parameter.empty if item.annotation is None else ast.unparse(item.annotation)
    return inspect.Parameter(item.arg, kind, default=_value(default), annotation=annotation)


def _value(default: ast.expr | None) -> Any:
    if default is None:
        return inspect.Parameter.empty
    try:
        return ast.literal_eval(default)
    except ValueError:
        return _NOT_PLAIN


def init_parameters(pipeline: str) -> dict[str, inspect.Parameter]:
    """Return the parameters of a pipeline class's `__init__`; {} if they cannot be read."""
    return next(filter(None, (parameters_of(node, "__init__") for node in lineage(pipeline))), {})


def optional_components(pipeline: str) -> list[str] | None:
    """Return the optional components of a pipeline class; None if its source does not show them."""
    value = next(filter(None, (assigned(node, "_optional_components") for node in lineage(pipeline))), None)
    try:
        return None if value is None else list(ast.literal_eval(value))
    except ValueError:
        return None


def init_defaults(model: str) -> dict[str, Any]:
    """Return the plain defaults of the `__init__` of a model class, which apply to missing entries of its
    configuration."""
    node = definition(model, "models")
    items = {} if node is None else parameters_of(node, "__init__")
    return {name: item.default for name, item in items.items() if item.default not in (item.empty, _NOT_PLAIN)}


def denoises(model: str) -> bool:
    """Return whether a class of that name is a denoiser."""
    folders = (package.removeprefix("diffusers.").replace(".", "/") for package in CUT_PACKAGES)
    return any(definition(model, within) is not None for within in folders)


def has_method(pipeline: str, name: str) -> bool:
    """Return whether a pipeline class has a method, of its own or of a base; True if the class itself cannot be
    found."""
    waiting, seen = [pipeline], set[str]()
    while waiting:
        base = waiting.pop()
        node = definition(base, "loaders") or definition(base)
        if node is None:
            if base == pipeline:
                return True
            continue  # in other folders, such as ConfigMixin and deprecation mixins
        if method(node, name) is not None:
            return True
        seen.add(base)
        waiting += [each for each in bases(node) if each not in seen]
    return False
