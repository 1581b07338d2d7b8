"""Reads from the annotation of a pipeline's argument which values it takes."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator

_TENSORS = {"Tensor", "FloatTensor", "LongTensor"}
_OPTIONAL = {"Optional", "Union", "None", "NoneType", "class"}
_FORMS = {
    **dict.fromkeys(("int", "float"), "number"),
    "bool": "flag",
    "str": "text",
    **dict.fromkeys(("list", "List", "tuple", "Tuple", "Sequence", "Iterable"), "list"),
    **dict.fromkeys(("dict", "Dict", "Mapping"), "dict"),
}
_NUMBERS = re.compile(r"tuple\[((?:int|float)(?:, (?:int|float))*)(, \.\.\.)?\]", re.IGNORECASE)


def forms_of(item: inspect.Parameter) -> tuple[str, ...]:
    """Return the forms of values that an argument takes (number, flag, text, list, dict); empty if it may take others,
    or has no annotation."""
    kinds = _kinds_of(item)
    return tuple(sorted({_FORMS[kind] for kind in kinds})) if all(kind in _FORMS for kind in kinds) else ()


def is_list(item: inspect.Parameter, of: str = "") -> bool:
    """Return whether an argument is a list and nothing else; of: the type of its entries."""
    lists = {kind.lower() for kind in _kinds_of(item)} == {"list"}
    return lists and (not of or f"[{of}]" in str(item.annotation))


def tuple_length(item: inspect.Parameter) -> int | None:
    """Return the length of an argument that is a tuple of numbers and nothing else, 0 for any; None if it is none."""
    found = _NUMBERS.search(str(item.annotation))
    if found is None or {kind.lower() for kind in _kinds_of(item)} != {"tuple"}:
        return None
    commas = found[1].count(",")
    return commas + 1 if commas and not found[2] else 0  # tuple[int] often means one of any length


def is_tensor(item: inspect.Parameter) -> bool:
    """Return whether an argument is a tensor and nothing else."""
    words = {word.rpartition(".")[2] for word in re.findall(r"[\w.]+", str(item.annotation))}
    # Stable Audio annotates a number so.
    return bool(words & _TENSORS) and words <= _TENSORS | _OPTIONAL and not item.name.endswith("_rate")


def _kinds_of(item: inspect.Parameter) -> list[str]:
    """Return the names of the types in an annotation, without None; [] if there are none."""
    if item.annotation is item.empty:
        return []
    shown = item.annotation.__name__ if isinstance(item.annotation, type) else str(item.annotation)
    try:
        return [kind for kind in _kinds(ast.parse(shown, mode="eval").body) if kind not in _OPTIONAL]
    except SyntaxError:
        return []


def _kinds(node: ast.expr) -> Iterator[str]:
    """Yield the names of the types in an annotation, without their parameters."""
    if isinstance(node, ast.BinOp):
        yield from (*_kinds(node.left), *_kinds(node.right))
        return
    outer = node.value if isinstance(node, ast.Subscript) else node
    name = ast.unparse(outer).rpartition(".")[2]
    if isinstance(node, ast.Subscript) and name in _OPTIONAL:
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for one in inner:
            yield from _kinds(one)
    else:
        yield name
