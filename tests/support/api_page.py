"""The page docs/api.md, made from the docstrings of public names: `python -m tests.support.api_page` writes it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import shardit
from tests.support.paths import DOCS

PAGE = DOCS / "api.md"
MODULES = ("shardit.parallel_state", "shardit.sp_plan", "shardit.sp_sharding", "shardit.mixins")
"""Public modules besides `shardit` itself."""

HEAD = """# API

Made from the docstrings by `make api`. The command line and HTTP have pages of their own: `shardit --help`,
[serving.md](serving.md).
"""


def page() -> str:
    """The text of the page."""
    parts = [HEAD, "## `shardit`\n"]
    parts += [_entry(name, getattr(shardit, name)) for name in sorted(shardit.__all__) if not name.startswith("__")]
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
    fields = list(_fields(value))
    known = {one for one, *_ in fields}
    given = _signature(value.__init__, bound=True) if inspect.isfunction(value.__init__) and not fields else ""
    lines = [f"### `{name}`\n", *([_code(f"class {name}{given}")] if given else []), f"{inspect.getdoc(value)}\n"]
    for one, kind, default, text in fields:
        lines.append(f"* `{one}: {kind}{f' = {default}' if default else ''}`{f': {text}' if text else ''}")
    lines += [""] if fields else []
    for one, member in vars(value).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if one.startswith("_") or one in known or not inspect.isfunction(function) or not inspect.getdoc(function):
            continue
        head = f"property `{one}`" if isinstance(member, property) else f"`{one}{_signature(function, bound=True)}`"
        lines.append(f"* {head}: {_flat(inspect.getdoc(function))}")
    return "\n".join(lines) + "\n"


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
    returns = f" -> {ast.unparse(tree.returns)}" if tree.returns is not None and not bound else ""
    return f"({ast.unparse(tree.args)}){returns}"


def _source(thing: Any) -> str:
    return textwrap.dedent(inspect.getsource(inspect.unwrap(thing)))


def _fields(cls: type) -> Iterator[tuple[str, str, str, str]]:
    """Annotated attributes in the body of a class: name, type, default and the text below."""
    tree = ast.parse(_source(cls)).body[0]
    assert isinstance(tree, ast.ClassDef)
    for node, after in zip(tree.body, [*tree.body[1:], ast.Pass()], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.target.id[0] == "_":
            continue
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
        kind = node.annotation
        if isinstance(kind, ast.Subscript) and ast.unparse(kind.value) == "Annotated":
            kind = kind.slice.elts[0] if isinstance(kind.slice, ast.Tuple) else kind
        value = node.value
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "_setting":
            value = value.args[0]
        default = ast.unparse(value) if value is not None else ""
        yield node.target.id, ast.unparse(kind), default, _flat(str(text))


def _flat(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
