"""model_index.json: the components of a pipeline and the classes they name."""

from __future__ import annotations

import difflib
import inspect
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardit.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

INDEX = "model_index.json"


@dataclass(frozen=True)
class Component:
    """One entry of model_index.json.

    `library` and `class_name` are as written there; `folder` holds its files (the model folder itself where the
    component has none of its own); `absent` means that the index says null: the pipeline runs without it.
    """

    name: str
    library: str | None
    class_name: str | None
    folder: Path
    absent: bool = False


def read_index(folder: str | os.PathLike) -> dict[str, Any]:
    """The content of model_index.json; InputError where it is missing or no JSON object."""
    path = Path(folder) / INDEX
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{folder} is not a diffusers folder (no {INDEX}): give the folder that holds it") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: download or copy it again") from error
    if not isinstance(table, dict) or "_class_name" not in table:
        raise InputError(f"{path} names no pipeline class (_class_name): download or copy it again")
    return table


def read_config(part: Component) -> dict[str, Any] | None:
    """The config.json of a component; None where it has none that can be read, which loading it will say."""
    try:
        found = json.loads((part.folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def components(folder: str | os.PathLike) -> dict[str, Component]:
    """The components by name, in the order of the index; plain values (boundary_ratio) are not components."""
    folder = Path(folder)
    found = {}
    for name, value in read_index(folder).items():
        if name.startswith("_") or not _names_a_class(value):
            continue
        own = folder / name
        found[name] = Component(name, value[0], value[1], own if own.is_dir() else folder, absent=value[0] is None)
    return found


def _names_a_class(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(part is None or isinstance(part, str) for part in value)


def is_left_to_class(
    part: Component, folder: Path, takes: Mapping[str, inspect.Parameter], optional: Collection[str]
) -> bool:
    """Whether a component of the model in `folder` has no files because the pipeline's class makes it.

    It then has a default in `__init__`. diffusers hands such a class the entry of the index, and loads nothing.
    """
    default = takes[part.name].default if part.name in takes else inspect.Parameter.empty
    return part.folder == folder and default is not inspect.Parameter.empty and part.name not in optional


def check_complete(
    folder: Path,
    class_name: str,
    takes: Mapping[str, inspect.Parameter],
    optional: Collection[str],
    parts: Mapping[str, Component],
) -> None:
    """InputError where the index lacks a component that a pipeline class cannot do without, or where one has no files.

    `takes` are the parameters of its `__init__`, `optional` its `_optional_components`, `parts` the components that it
    takes.
    """
    table = read_index(folder)
    named = [name for name, value in table.items() if name in parts or not isinstance(value, list)]
    for name, parameter in list(takes.items())[1:]:
        required = parameter.default is parameter.empty and name not in optional
        if required and parameter.kind is not parameter.VAR_KEYWORD and name not in named:
            raise InputError(f"{folder / INDEX} has no {name}, which {class_name} needs: download it again")
    # Where a component has no folder, its files may lie beside the index.
    beside = any((folder / file).is_file() for file in _BESIDE)
    for name, part in parts.items():
        if part.folder == folder and not beside:
            raise InputError(f"{folder / name} is missing: download or copy the model again")


_BESIDE = ("config.json", "tokenizer_config.json", "scheduler_config.json", "preprocessor_config.json")


def pipeline_class(folder: str | os.PathLike, name: str | None = None) -> type[DiffusionPipeline]:
    """The diffusers class called `name`, or the one that the index names.

    Raises InputError for an unknown class, UnsupportedError for a pipeline whose code lies in the model folder.
    """
    import diffusers
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    wanted = name or read_index(folder)["_class_name"]
    if not isinstance(wanted, str):
        raise UnsupportedError(
            f"{folder} brings its own pipeline code ({wanted}), which is not run: give pipeline_class= one of diffusers"
        )
    found = getattr(diffusers, wanted, None)
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        _refuse_dummy(found, wanted)
        known = [each for each in dir(diffusers) if each.endswith("Pipeline")]
        near = difflib.get_close_matches(wanted, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "upgrade diffusers or choose another pipeline_class"
        raise InputError(f"diffusers {diffusers.__version__} has no pipeline class {wanted!r}: {hint}")
    _refuse_dummy(found, wanted)
    return found


def component_class(component: Component) -> type:
    """The class of a component, found the way diffusers finds it.

    Raises UnsupportedError for code in the model folder, other libraries, and classes this installation lacks.
    """
    import diffusers
    import transformers

    library, name = component.library, component.class_name
    if library is None or name is None:
        raise InputError(f"component {component.name} is null in {INDEX}: give it another model folder")
    if hasattr(diffusers.pipelines, library):
        home = getattr(diffusers.pipelines, library)
    elif library in ("diffusers", "transformers"):
        home = {"diffusers": diffusers, "transformers": transformers}[library]
    else:
        raise UnsupportedError(
            f"component {component.name} needs code from {library!r}, which is not run: "
            "only diffusers and transformers components can be loaded"
        )
    found = getattr(home, name, None) or getattr(home, _renamed(library, name), None)
    if found is None:
        raise UnsupportedError(f"component {component.name}: {library} has no class {name} here: upgrade {library}")
    _refuse_dummy(found, name)
    return found


def _renamed(library: str, name: str) -> str:
    """The present name of a transformers class that was renamed ("" where there is none)."""
    if library != "transformers":
        return ""
    try:
        from diffusers.utils.deprecation_utils import _maybe_remap_transformers_class as remap
    except ImportError:
        remap = {"CLIPFeatureExtractor": "CLIPImageProcessor"}.get
    return remap(name) or name.removesuffix("Fast")


def _refuse_dummy(found: object, name: str) -> None:
    """diffusers and transformers stand in for classes whose packages are missing."""
    backends = getattr(found, "_backends", None)
    if isinstance(found, type) and type(found).__name__ == "DummyObject" and backends:
        from shardit.loading.missing import is_missing, pip_line

        lacking = [each for each in backends if is_missing(each)] or backends
        raise UnsupportedError(f"{name} needs {', '.join(lacking)}, which is not installed: {pip_line(lacking)}")
