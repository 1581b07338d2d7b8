"""Lines of code of each folder of the package, without blank lines, docstrings and imports: `make size`."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import shardit

ROOT = Path(shardit.__file__).parent


def code_lines(text: str) -> int:
    """Lines of a module that are neither blank, nor of docstrings, nor of imports."""
    lines = {number for number, line in enumerate(text.splitlines(), start=1) if line.strip()}
    for node in ast.walk(ast.parse(text)):
        constant = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if constant or isinstance(node, (ast.Import, ast.ImportFrom)):
            assert isinstance(node, ast.stmt)
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def sizes() -> Counter[str]:
    """Lines of code by the first two folders below the package; "." for its own files."""
    found: Counter[str] = Counter()
    for path in ROOT.rglob("*.py"):
        folders = path.relative_to(ROOT).parts[:-1][:2]
        found["/".join(folders) or "."] += code_lines(path.read_text("utf-8"))
    return found


def main() -> None:
    """Print the table."""
    found = sizes()
    for folder, lines in sorted(found.items()):
        print(f"{lines:6}  {folder}")
    print(f"{sum(found.values()):6}  all")


if __name__ == "__main__":
    main()
