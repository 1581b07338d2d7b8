"""Statement coverage of `src/`, in all processes that tests start: `python -m tests.support.coverage_marks FOLDER`.

Ranks are forked, killed and end without clean-up, and a tracer makes them several times slower. So the statements of a
copy of the package mark their lines themselves, in files that all processes map. FOLDER is a clone to be changed:
`mark` it, run its tests, `report` it (see `make coverage`).
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

MARKS = "_shardit_marks"

MODULE = """import mmap
def of(path: str, lines: int):
    with open(path, "ab+") as file:
        file.truncate(lines)
        return mmap.mmap(file.fileno(), lines)
"""


class Marked(ast.NodeTransformer):
    """Puts `_marks[line] = 1` in front of each statement."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(node, name, None)
            if isinstance(statements, list):
                setattr(node, name, [new for one in statements for new in self._with_mark(node, one)])
        return node

    def _with_mark(self, parent: ast.AST, statement: ast.stmt) -> list[ast.stmt]:
        text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        future = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
        return [statement] if text or future else [*map(_mark, _lines(parent, statement)), statement]


def _lines(parent: ast.AST, statement: ast.stmt) -> set[int]:
    """The lines that have run once a statement is reached: its own, those of its decorators, that of its `except`."""
    decorators = getattr(statement, "decorator_list", [])
    lines = {statement.lineno, *(one.lineno for one in decorators)}
    return {*lines, parent.lineno} if isinstance(parent, ast.ExceptHandler) else lines


def _mark(line: int) -> ast.stmt:
    return ast.parse(f"{MARKS}[{line}] = 1").body[0]


def mark(root: Path) -> None:
    """Let the statements of the package below `root` mark their lines. Its own text is kept beside, for the report."""
    package = root / "src/shardit"
    for path in sorted(package.rglob("*.py")):
        text = path.read_text()
        kept = root / "unmarked" / path.relative_to(package)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(text)
        tree = Marked().visit(ast.parse(text))
        first = next((n for n, one in enumerate(tree.body) if MARKS in ast.unparse(one)), len(tree.body))
        opened = f"import {MARKS}\n{MARKS} = {MARKS}.of({str(_hits(kept))!r}, {text.count(chr(10)) + 2})"
        tree.body[first:first] = ast.parse(opened).body
        path.write_text(ast.unparse(ast.fix_missing_locations(tree)) + "\n")
    (root / "src" / f"{MARKS}.py").write_text(MODULE)


def report(root: Path) -> None:
    """Print the share of statements that have run, of each folder and of all."""
    import coverage

    data = coverage.CoverageData(str(root / ".coverage"))
    for path in sorted((root / "unmarked").rglob("*.py")):
        hits = _hits(path).read_bytes() if _hits(path).exists() else b""
        data.add_lines({str(path): [line for line, hit in enumerate(hits) if hit]})
    data.write()
    tool = coverage.Coverage(data_file=str(root / ".coverage"), source=[str(root / "unmarked")])
    tool.load()
    tool.report(skip_empty=True, sort="cover")


def _hits(kept: Path) -> Path:
    return kept.with_suffix(".hits")


if __name__ == "__main__":
    {"mark": mark, "report": report}[sys.argv[1]](Path(sys.argv[2]).resolve())
