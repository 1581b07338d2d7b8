"""Attention back ends of diffusers, by name."""

from __future__ import annotations

import ast
import re
from typing import Any

from shardit.diffusion.loading.diffusers_source import definition, folder
from shardit.errors import InputError, first_line
from shardit.loading.missing_packages import is_missing, pip_line


def check_attention_backend(name: str | None) -> None:
    """Raise InputError for a name that the installed diffusers does not know, and if the package of a back end is not
    installed. Imports none of them."""
    if name is None or not (known := backend_names()):
        return
    if name.lower() in known:
        if (package := package_of(name.lower())) and is_missing(package):
            raise InputError(
                f"attention_backend={name!r} needs {package}, which is not installed: {pip_line([package])}"
            )
        return
    shown = sorted(each for each in known if not each.startswith("_"))
    raise InputError(f"there is no attention back end {name!r}; diffusers has {', '.join(shown)}")


def backend_names() -> list[str]:
    """Return the names that diffusers knows, read from its source; [] if the source cannot be read."""
    return list(_members())


def _members() -> dict[str, str]:
    """Map each name to its identifier in the source."""
    node = definition("AttentionBackendName", "models")
    lines = (line for line in ([] if node is None else node.body) if isinstance(line, ast.Assign))
    pairs = ((line.value, line.targets[0]) for line in lines)
    return {
        value.value: target.id
        for value, target in pairs
        if isinstance(value, ast.Constant) and isinstance(value.value, str) and isinstance(target, ast.Name)
    }


def package_of(name: str) -> str | None:
    """Return the package that diffusers checks for before it uses a back end, read from its source; None if there is
    none, or if the source does not show it."""
    root = folder()
    if root is None:
        return None
    try:
        tree = ast.parse((root / "models" / "attention_dispatch.py").read_bytes())
        packages = (root / "utils" / "import_utils.py").read_text(encoding="utf-8")
    except OSError:
        return None
    flags = {
        target.id: ast.unparse(line.value)
        for line in tree.body
        if isinstance(line, ast.Assign) and isinstance(target := line.targets[0], ast.Name)
    }
    member = _members().get(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and member in re.findall(r"AttentionBackendName\.(\w+)", ast.unparse(node.test)):
            asked = next((ast.unparse(one.test) for one in node.body if isinstance(one, ast.If)), "")
            asked = re.sub(r"\w+", lambda word: flags.get(word[0], word[0]), asked)
            guard = re.search(r"not is_(\w+)_available\(\)", asked)
            if guard and f'_is_package_available("{guard[1]}")' in packages:
                return guard[1]
    return None


def use_attention_backend(name: str | None, model: Any) -> None:
    """Make a transformer of diffusers use a back end. Raises InputError if the model or this machine does not support
    it."""
    if name is None:
        return
    check_attention_backend(name)
    kind = type(model).__name__
    if not hasattr(model, "set_attention_backend"):
        raise InputError(f"attention_backend={name!r}: {kind} has no choice of back ends; leave it out")
    try:
        model.set_attention_backend(name)
    except (ValueError, RuntimeError, ImportError) as error:
        first = first_line(error)
        raise InputError(f"attention_backend={name!r} cannot be used for {kind}: {first}") from error
