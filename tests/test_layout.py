"""The layout of the package: what imports what, and how large things are."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import shardit
from bench.size import sizes
from shardit.diffusion.family import (
    EXPERTS,
    FEED_FORWARDS,
    FUSED_ATTENTIONS,
    HEAD_OUTPUTS,
    HEAD_TABLES,
    HEAD_WIDTHS,
    KEPT_ATTENTIONS,
    KEPT_PROCESSORS,
    PARALLEL_BLOCKS,
)
from shardit.language.tensor import FAMILY as DECODERS
from tests.support import long_tests

ROOT = Path(shardit.__file__).parent
FILE_LINES = 350
FUNCTION_LINES = 50


@cache
def trees() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text("utf-8"))
    return found


@cache
def imports(name: str) -> set[str]:
    """The modules of the package that a module imports anywhere in its code, but for its types alone."""
    found: set[str] = set()
    todo: list[ast.AST] = [trees()[name]]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{one.name}" for one in node.names}
            found |= full & trees().keys() or {node.module}
        elif isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            todo += ast.iter_child_nodes(node)
    return {one for one in found if one in trees()} - {name, "shardit"}


def test_modules_named_in_strings_exist() -> None:
    """Processes and lazy imports name modules in strings, which no tool follows when a module moves."""
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and re.fullmatch(r"shardit(\.\w+)+(:\w+)?", str(node.value)):
                assert importlib.util.find_spec(node.value.partition(":")[0]) is not None, (name, node.value)


def _arrows(folder: str) -> dict[str, set[str]]:
    """The imports among the files and folders of a folder, where a folder stands for all that is in it."""
    depth = folder.count(".") + 1
    arrows: dict[str, set[str]] = defaultdict(set)
    for name in trees():
        if name.startswith(f"{folder}."):
            inside = {one for one in imports(name) if one.startswith(f"{folder}.")}
            child = name.split(".")[depth]
            arrows[child] |= {one.split(".")[depth] for one in inside} - {child}
    return arrows


def test_imports_have_no_circle() -> None:
    for folder in {name.rpartition(".")[0] for name in trees()} - {""}:
        assert not (circle := _circle(_arrows(folder))), f"{folder}: {' -> '.join(circle)}"


def _upward(table: str, arrows: dict[str, set[str]]) -> list[str]:
    """The imports of a row of a table of the map from a row above it, and what has no row."""
    rows = [re.findall(r"`([\w*]+)(?:/|\.py)`", line.split("|")[1]) for line in table.splitlines() if "|" in line]
    place = {name: row for row, names in enumerate(rows) for name in names}
    places = {child: place.get(child, place.get("*", -1)) for child in {*arrows, *set().union(*arrows.values())}}
    found = [f"{child} has no row" for child in places if places[child] < 0]
    return found + [f"{a} -> {b}" for a in arrows for b in arrows[a] if places[b] < places[a]]


def test_imports_point_down_the_tables_of_the_map() -> None:
    page = (ROOT.parent.parent / "docs/map.md").read_text("utf-8").partition("## The rest")[0]
    tables = re.findall(r"^(?:## The package, `src/(\w+)/`|`(\w+)/`.*:)\n\n((?:\|.*\n)+)", page, re.M)
    assert [inner for _, inner, _ in tables] == ["", "core", "parallel", "diffusion", "engine", "server"]
    for outer, inner, table in tables:
        folder = outer or f"shardit.{inner}"
        assert not (found := _upward(table, _arrows(folder))), (folder, found)


def test_an_upward_import_is_found() -> None:
    table = "| `a/`, `b.py` | text |\n| `*.py` | `c/` |\n"
    assert not _upward(table, {"a": {"b", "c"}, "b": {"a"}})
    assert _upward(table, {"c": {"a"}}) == ["c -> a"]
    assert _upward("| `a/` | `c/` |\n", {"a": set(), "c": {"a"}})[0] == "c has no row"


def _circle(arrows: dict[str, set[str]]) -> list[str]:
    done: set[str] = set()

    def walk(child: str, way: list[str]) -> list[str]:
        if child in way:
            return [*way[way.index(child) :], child]
        if child in done:
            return []
        found = next((circle for one in sorted(arrows[child]) if (circle := walk(one, [*way, child]))), [])
        done.add(child)
        return found

    return next((circle for child in sorted(arrows) if (circle := walk(child, []))), [])


def test_a_circle_is_found() -> None:
    assert _circle(defaultdict(set, {"a": {"b"}, "b": {"c"}, "c": {"b"}})) == ["b", "c", "b"]
    assert not _circle(defaultdict(set, {"a": {"b", "c"}, "b": {"c"}}))


def test_files_and_functions_are_small() -> None:
    for path in ROOT.rglob("*.py"):
        text = path.read_text("utf-8")
        assert len(text.splitlines()) <= FILE_LINES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno:
                assert node.end_lineno - node.lineno < FUNCTION_LINES, (path, node.name)


FOLDER_FILES = 14


def test_folders_are_small() -> None:
    for folder in {path.parent for path in ROOT.rglob("*.py")}:
        files = [path for path in folder.iterdir() if path.is_file() and path.name not in ("__init__.py", "py.typed")]
        assert len(files) <= FOLDER_FILES, folder


def test_each_class_has_a_name_of_its_own() -> None:
    """One name has one meaning in the package, so a search for it finds one definition."""
    homes: dict[str, list[str]] = defaultdict(list)
    for name, tree in trees().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(name)
    assert not {name: places for name, places in homes.items() if len(places) > 1}


def test_files_named_in_docs_exist() -> None:
    repository = ROOT.parent.parent
    for page in (repository / "README.md", *(repository / "docs").glob("*.md")):
        for name in re.findall(r"`([\w/]+/\w+\.py)`", page.read_text("utf-8")):
            assert (ROOT / name).exists() or (repository / name).exists(), (page.name, name)


FAMILIES = ("diffusers", "transformers", "peft", "accelerate")
ARGUMENTS = re.compile(r"^(negative_)?prompt|attention_kwargs|hidden_states|^context$|rotary|^rope|^guidance|^timestep")
"""Names of arguments that a model family gives its classes; a task hands over those that matter."""


def test_core_and_parallel_know_no_model_family() -> None:
    """Neither imports, nor names of classes or modules in strings; docstrings may give examples."""
    for name, tree in trees().items():
        if not name.startswith(("shardit.core.", "shardit.parallel.")):
            continue
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            found = []
            if isinstance(node, ast.Import):
                found = [one.name for one in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [str(node.module)]
            elif isinstance(node, ast.Constant) and id(node) not in docstrings:
                found = [str(node.value)]
            assert not any(one.partition(".")[0] in FAMILIES or one in CLASSES for one in found), (name, found)
            assert not any(re.search(ARGUMENTS, one) for one in found), (name, found)
        inside = r"shardit\.(core|config|errors)\b" if name.startswith("shardit.core.") else r"shardit\.(?!diffusion\b)"
        assert all(re.match(inside, one) for one in imports(name)), name


def test_modules_change_nothing_of_others_at_import() -> None:
    """A model family hands over what core needs of it, when a model becomes parallel."""
    for name, tree in trees().items():
        for node in tree.body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                assert isinstance(node.value.func, ast.Name), (name, node.lineno)


def test_language_models_need_nothing_of_pipelines() -> None:
    for name in trees():
        if name.startswith("shardit.language."):
            assert not any(one.startswith("shardit.diffusion") for one in imports(name)), name


CLASSES = {*KEPT_ATTENTIONS, *KEPT_PROCESSORS, *HEAD_TABLES, *HEAD_WIDTHS, *HEAD_OUTPUTS}.union(
    *(rule.classes for rule in (*EXPERTS, *FEED_FORWARDS, *FUSED_ATTENTIONS, *PARALLEL_BLOCKS)),
    *(rule.classes for rule in (*DECODERS.feed_forwards, *DECODERS.fused_attentions)),
    *(rule.classes for rule in (*DECODERS.channel_states, *DECODERS.head_states, *DECODERS.experts)),
)
"""Names of classes of a model family."""


def test_the_server_imports_no_torch() -> None:
    """Neither at import nor through what it imports; functions that run on ranks may."""
    done: set[str] = set()
    todo = {name for name in trees() if name.startswith("shardit.server.")}
    while todo:
        name = todo.pop()
        done.add(name)
        for node in trees()[name].body:
            if isinstance(node, ast.Import):
                assert not any(one.name.partition(".")[0] == "torch" for one in node.names), name
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.partition(".")[0] not in ("torch", "diffusers", "transformers"), name
                full = {f"{node.module}.{one.name}" for one in node.names}
                todo |= (full & trees().keys() or {node.module} & trees().keys()) - done


BUDGET = {
    ".": 1329,
    "core": 7830,
    "diffusion": 4096,
    "engine": 3070,
    "language": 2829,
    "loading": 1435,
    "models": 936,
    "parallel": 5250,
    "server": 5335,
    "settings": 469,
    "training": 4287,
}
"""Lines of code of each folder, as `make size` counts them; a number is raised on purpose, or not at all."""


def test_folders_keep_within_their_budget() -> None:
    found: Counter[str] = Counter()
    for folder, lines in sizes().items():
        found[folder.partition("/")[0]] += lines
    for folder, lines in found.items():
        assert lines <= BUDGET[folder], folder


def test_long_tests_exist() -> None:
    for test in long_tests.listed():
        file, _, function = long_tests.function_of(test).partition("::")
        assert f"def {function}(" in (long_tests.LIST.parent.parent / file).read_text("utf-8"), test


def test_the_shortest_test_of_each_file_is_not_long() -> None:
    seconds = {"a.py::x[1]": 5.0, "a.py::x[2]": 3.0, "a.py::y": 4.0, "b.py::z": 9.0}
    assert long_tests.choose(seconds, 100) == []
    assert long_tests.choose(seconds, 16) == ["a.py::x[1]"]
    assert long_tests.choose(seconds, 0) == ["a.py::x[1]", "a.py::y"]
