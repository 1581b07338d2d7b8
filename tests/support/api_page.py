"""The page docs/api.md, made from the docstrings of public names: `python -m tests.support.api_page` writes it."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import shardit
from shardit.engine.process.messages import SessionSpec
from shardit.settings.checks import FLAG, NAME, TEXT
from shardit.settings.declare import declared
from shardit.settings.model_options import ModelOptions
from tests.support.paths import DOCS

PAGE = DOCS / "api.md"
MODULES = (
    "shardit.parallel_state",
    "shardit.sp_plan",
    "shardit.sp_sharding",
    "shardit.mixins",
    "shardit.training.staged",
)
"""Public modules besides `shardit` itself."""

FACTORY = re.compile(r"^field\(default_factory=dict\)$")
"""A default that is an empty dict."""

HEAD = """# API

Made from the docstrings by `make api`. The command line and HTTP have pages of their own: `shardit --help`,
[serving.md](serving.md).
"""


def page() -> str:
    """The text of the page."""
    parts = [HEAD, "## `shardit`\n"]
    for name in sorted(shardit.__all__):
        parts += [_entry(name, getattr(shardit, name))] if not name.startswith("__") else []
        parts += [_settings()] if name == "Omni" else []
    for name in MODULES:
        module = importlib.import_module(name)
        parts.append(f"## `{name}`\n\n{inspect.getdoc(module)}\n")
        parts += [_entry(each, value) for each, value in _public(module)]
    return "\n".join(parts)


def _public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Functions and classes that a module defines, in its order."""
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        if own and not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
            yield name, value


def _entry(name: str, value: Any) -> str:
    if not inspect.isclass(value):
        return f"### `{name}`\n\n{_code(name + _signature(value))}\n{inspect.getdoc(value)}\n"
    if value.__name__ != name:
        return f"### `{name}`\n\nAnother name of `{value.__name__}`.\n"
    fields = list(_fields(value))
    known = {one for one, *_ in fields}
    given = _signature(value.__init__, bound=True) if inspect.isfunction(value.__init__) and not fields else ""
    lines = [f"### `{name}`\n", *([_code(f"class {name}{given}")] if given else []), f"{inspect.getdoc(value)}\n"]
    lines += [*_lines(fields), ""] if fields else []
    for one, member in vars(value).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if one.startswith("_") or one in known or not inspect.isfunction(function) or not inspect.getdoc(function):
            continue
        head = f"property `{one}`" if isinstance(member, property) else f"`{one}{_signature(function, bound=True)}`"
        lines.append(f"* {head}: {_flat(inspect.getdoc(function))}")
    return "\n".join(lines) + "\n"


def _settings() -> str:
    lines = [line for kind in (SessionSpec, ModelOptions) for line in _lines(_fields(kind, only_declared=True))]
    return "\n".join(["### Settings of `Omni`\n", *lines]) + "\n"


def _lines(found: Iterable[tuple[str, str, str, str]]) -> list[str]:
    return [
        f"* `{one}: {kind}{f' = {default}' if default else ''}`{f': {text}' if text else ''}"
        for one, kind, default, text in found
    ]


def _code(text: str) -> str:
    """A signature as a block of code, with an argument on each line where it is long."""
    if len(text) > 100:
        head, _, rest = text.partition("(")
        inside, _, tail = rest.rpartition(")")
        text = f"{head}(\n    " + ",\n    ".join(re.split(r", (?=[\w*])(?![^\[]*\])", inside)) + f",\n){tail}"
    return f"```text\n{text}\n```\n"


def _signature(function: Any, bound: bool = False) -> str:
    """The signature as it stands in the source, without `self`."""
    tree = ast.parse(_source(function)).body[0]
    assert isinstance(tree, ast.FunctionDef)
    if bound and tree.args.args:
        tree.args.args = tree.args.args[1:]
    for defaults in (tree.args.defaults, tree.args.kw_defaults):
        defaults[:] = [node and _resolved(node, inspect.unwrap(function)) for node in defaults]  # type: ignore[arg-type]
    returns = f" -> {ast.unparse(tree.returns)}" if tree.returns is not None and not bound else ""
    return f"({ast.unparse(tree.args)}){returns}"


def _resolved(node: ast.expr, inside: Any) -> ast.expr:
    """The default of a setting that is declared elsewhere: its value in place of its name."""
    if not isinstance(node, (ast.Name, ast.Attribute)):
        return node
    value = eval(ast.unparse(node), vars(inspect.getmodule(inside)))
    return ast.Constant(value) if isinstance(value, (int, float, str)) else node


def _source(thing: Any) -> str:
    return textwrap.dedent(inspect.getsource(inspect.unwrap(thing)))


def _fields(cls: type, *, only_declared: bool = False) -> Iterator[tuple[str, str, str, str]]:
    """Annotated attributes in the body of a class: name, type, default and documentation. For a declared setting these
    are its help, its valid values, and the text below."""
    tree = ast.parse(_source(cls)).body[0]
    assert isinstance(tree, ast.ClassDef)
    settings = {item.name: item for item in declared(cls)} if dataclasses.is_dataclass(cls) else {}
    for node, after in zip(tree.body, [*tree.body[1:], ast.Pass()], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.target.id[0] == "_":
            continue
        name, text = node.target.id, ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = str(after.value.value)
        kind = node.annotation
        if isinstance(kind, ast.Subscript) and ast.unparse(kind.value) == "Annotated":
            kind = kind.slice.elts[0] if isinstance(kind.slice, ast.Tuple) else kind
        default = FACTORY.sub("{}", ast.unparse(_resolved(node.value, cls))) if node.value is not None else ""
        if name in settings:
            default, text = _declaration(settings[name], text)
        if name in settings or not only_declared:
            yield name, ast.unparse(kind), default, _flat(text)


def _declaration(item: dataclasses.Field[Any], more: str) -> tuple[str, str]:
    """The default of a declared setting, and its meaning."""
    check, factory = item.metadata["check"], item.default_factory
    default = item.default if factory is dataclasses.MISSING else factory()
    help, _, unset = item.metadata["help"].partition(" [default: ")
    plain = check in (None, TEXT, NAME, FLAG)  # which the type says, too
    values = "" if plain else f"{check.meaning[0].upper()}{check.meaning[1:]}."
    return repr(default), f"{help} {values} {more} {f'Default: {unset[:-1]}.' if unset else ''}"


def _flat(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
