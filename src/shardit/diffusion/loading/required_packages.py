"""Finds missing packages of a pipeline before a request fails for them."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from shardit.diffusion.loading import diffusers_source
from shardit.errors import InputError
from shardit.loading.index import Component, component_class
from shardit.loading.missing_packages import FRAMEWORKS, check_installed, is_missing, pip_line
from shardit.loading.quiet import quiet

_NAMED = (
    *("bs4", "cv2", "ftfy", "librosa", "protobuf", "scipy", "sentencepiece", "soundfile", "tiktoken", "torchaudio"),
    *("torchvision", "torchsde", "jinja2", "blobfile", "peft", "accelerate"),
)
"""Patterns of errors in which libraries name a missing package."""

_GUARD = re.compile(r"is_\w+_available")


def named_in(text: str) -> list[str]:
    """Return the missing packages that the text of an error names."""
    words = set(re.findall(r"\w+", text.lower()))
    return [name for name in _NAMED if name in words and is_missing(name)]


def needs(pipeline_class: type) -> dict[str, tuple[str, ...]]:
    """Return packages that a pipeline class's call uses although its module imports them only if they are installed, in
    code without a check. With each, the arguments of which one must be given to reach that code; () if every call does.
    Runs nothing."""
    for base in pipeline_class.__mro__:
        module = sys.modules.get(base.__module__)
        if base.__module__.startswith("diffusers.pipelines.") and module is not None and "__call__" in vars(base):
            return dict(_needs(inspect.getsource(module), base.__name__))
    return {}


def missing(pipeline_class: type) -> dict[str, tuple[str, ...]]:
    """Return the packages of `needs` that are not installed."""
    return {name: arguments for name, arguments in needs(pipeline_class).items() if is_missing(name)}


def missing_by_name(pipeline: str) -> dict[str, tuple[str, ...]]:
    """Do the same for a pipeline class of the installed diffusers by name, without importing it."""
    for node in diffusers_source.lineage(pipeline):
        if diffusers_source.method(node, "__call__") is not None:
            found = _needs(diffusers_source.module_of(node.name), node.name)
            return {name: arguments for name, arguments in found if is_missing(name)}
    return {}


def check_frameworks() -> None:
    """Raise InputError if a package is missing without which no model can be loaded."""
    check_installed(("diffusers", *FRAMEWORKS))


def check_packages(class_name: str, lacking: Mapping[str, Collection[str]], given: Collection[str] = ()) -> None:
    """Raise InputError, with the install command, if packages are missing for a call with the `given` arguments."""
    names = [name for name, arguments in lacking.items() if not arguments or set(arguments) & set(given)]
    if names:
        raise InputError(f"{class_name} needs {', '.join(names)}, which is not installed: {pip_line(names)}")


def check_processors(components: Iterable[Component]) -> None:
    """Raise InputError if a tokenizer or processor cannot be made because a package is missing; other errors are left
    to the loading of the pipeline."""
    from shardit.models.processor import is_needed

    for part in components:
        if part.library != "transformers" or part.absent or is_needed(str(part.class_name)):
            continue
        try:
            with quiet():
                component_class(part).from_pretrained(str(part.folder))  # pyright: ignore[reportAttributeAccessIssue]
        except Exception as error:
            check_packages(f"{part.class_name} ({part.name})", dict.fromkeys(named_in(str(error)), ()))


@functools.lru_cache(maxsize=16)
def _needs(source: str, class_name: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    tree = ast.parse(source)
    optional = dict(_optional_imports(tree))
    questions = frozenset(name for _, guards in optional.values() for name in guards)
    functions: dict[str, Any] = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            functions.update({f"self.{x.name}": x for x in node.body if isinstance(x, ast.FunctionDef)})
    found: dict[str, tuple[str, ...]] = {}
    waiting: list[tuple[str, frozenset[str]]] = [("self.__call__", frozenset())]
    seen = set(waiting)
    while waiting:
        name, asked = waiting.pop()
        node = functions[name]
        # After a check in a function, the package is available in the rest of it, including its callees.
        asked |= {x.id for x in ast.walk(node) if isinstance(x, ast.Name)} & questions
        for used, arguments in _names(node, name == "self.__call__"):
            package, guards = optional.get(used, ("", frozenset()))
            if package and not guards & asked:
                before = found.get(package, arguments)
                found[package] = tuple(sorted({*before, *arguments})) if before and arguments else ()
            if used in functions and (used, asked) not in seen:
                seen.add((used, asked))
                waiting.append((used, asked))
    return tuple(sorted(found.items()))


def _names(node: ast.FunctionDef, is_call: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the names that a function reads, and methods of its own object as "self.name"; for the pipeline's call with
    the arguments that must be given there: `if image is not None: ...`."""
    arguments = {item.arg for item in (*node.args.args, *node.args.kwonlyargs)} - {"self"} if is_call else set()

    # `is_image = image is not None`, tested later.
    assigned = (x for x in ast.walk(node) if isinstance(x, ast.Assign) and isinstance(x.targets[0], ast.Name))
    flags = {getattr(x.targets[0], "id", ""): found for x in assigned if (found := _given(x.value))}

    def walk(x: ast.AST, given: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
        if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load):
            yield x.id, given
        elif isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name) and x.value.id == "self":
            yield f"self.{x.attr}", given
        inside = given
        if isinstance(x, ast.If):
            argument = _given(x.test)
            argument = flags.get(argument, argument)
            inside = (*given, argument) if argument in arguments else given
        for field, value in ast.iter_fields(x):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from walk(child, inside if field == "body" else given)

    yield from walk(node, ())


def _given(test: ast.expr) -> str:
    """Return the name in `name is not None` and `name`; "" for other conditions."""
    if isinstance(test, ast.Name):
        return test.id
    if isinstance(test, ast.Compare) and isinstance(test.left, ast.Name) and isinstance(test.ops[0], ast.IsNot):
        return test.left.id
    return ""


def _optional_imports(tree: ast.Module) -> Iterator[tuple[str, tuple[str, frozenset[str]]]]:
    """Yield (name, (package, names of its checks)) of `if is_..._available(): import ...`. Code may also check a flag
    that is set there. Packages with a stand-in are left out."""
    for node in tree.body:
        if not isinstance(node, ast.If) or isinstance(node.test, ast.UnaryOp):
            continue
        guards = {x.id for x in ast.walk(node.test) if isinstance(x, ast.Name) and _GUARD.fullmatch(x.id)}
        flags = {x.id for line in node.body for x in ast.walk(line) if isinstance(x, ast.Name) and _is_set(x)}
        others = {getattr(line, "name", "") for line in node.orelse}
        for line in node.body if guards else ():
            if isinstance(line, ast.Import) or (isinstance(line, ast.ImportFrom) and line.level == 0):
                for alias in line.names:
                    package = (getattr(line, "module", None) or alias.name).split(".")[0]
                    name = alias.asname or alias.name.split(".")[0]
                    if name not in others:
                        yield name, (package, frozenset(guards | flags))


def _is_set(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)
