"""Reads model_index.json: the components of a pipeline and their classes."""

from __future__ import annotations

import difflib
import inspect
import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardit.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

INDEX = "model_index.json"

LFS_POINTER = b"version "
"""The first bytes of the file that git-lfs leaves in place of another."""

ADAPTER_CONFIG = "adapter_config.json"
"""The configuration file of an adapter of peft."""


@dataclass(frozen=True)
class Component:
    """One entry of model_index.json.

    library, class_name: as written there. folder: the folder of its files (the model folder if the component has no
    folder of its own). absent: the value is null, so the pipeline runs without the component.
    """

    name: str
    library: str | None
    class_name: str | None
    folder: Path
    absent: bool = False


def read_index(folder: str | os.PathLike) -> dict[str, Any]:
    """Return the content of model_index.json. Raises InputError if it is missing or not a JSON object."""
    path = Path(folder) / INDEX
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError as error:
        refuse_adapter(folder)
        raise InputError(f"{folder} is not a diffusers folder (no {INDEX}): give the folder that holds it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: download or copy it again") from error
    if not isinstance(table, dict) or not table.get("_class_name") or not isinstance(table["_class_name"], (str, list)):
        raise InputError(f"{path} names no pipeline class (_class_name): download or copy it again")
    return table


def refuse_adapter(folder: str | os.PathLike[str]) -> None:
    """Raise InputError if a folder that was given as a model holds an adapter of peft."""
    if (Path(folder) / ADAPTER_CONFIG).is_file():
        raise InputError(
            f"{folder} holds an adapter, no model: give the model that it was trained on{base_model(folder)}, and this "
            f"folder as lora (--lora {folder})"
        )


def base_model(folder: str | os.PathLike[str]) -> str:
    """Return the model on which an adapter of peft was trained, in brackets; "" if its files do not state it."""
    name = read_adapter(folder).get("base_model_name_or_path")
    return f" ({name})" if name else ""


def read_adapter(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of adapter_config.json; an empty one if it is missing or unreadable."""
    try:
        found = json.loads((Path(folder) / ADAPTER_CONFIG).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def damaged_json(paths: Iterable[Path]) -> str | None:
    """Return which of these files is the first, in order of names, that holds no JSON, and the remedy; None if all do.
    Errors of the libraries do not name it."""
    for path in sorted(paths):
        try:
            json.loads(path.read_text("utf-8"))
        except PermissionError as error:
            return f"{path} cannot be read ({error.strerror}): download or copy it again"
        except (OSError, ValueError, RecursionError):
            pointer = path.is_file() and path.read_bytes().startswith(LFS_POINTER)
            damage = "is a git-lfs pointer: run `git lfs pull` in its repository"
            return f"{path} {damage if pointer else 'is damaged: download or copy it again'}"
    return None


def read_config(part: Component) -> dict[str, Any] | None:
    """Return the config.json of a component; None if it is missing or unreadable, an error that loading reports."""
    try:
        found = json.loads((part.folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def components(folder: str | os.PathLike) -> dict[str, Component]:
    """Return the components by name, in the order of the index; plain values (boundary_ratio) are not components."""
    folder = Path(folder)
    found = {}
    for name, value in read_index(folder).items():
        if name.startswith("_"):
            continue
        own = folder / name
        if not _names_a_class(value):
            if own.is_dir():
                raise InputError(f"{folder / INDEX} has {value!r} for {name}, no class: download or copy it again")
            continue
        found[name] = Component(name, value[0], value[1], own if own.is_dir() else folder, absent=value[0] is None)
    return found


def _names_a_class(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(part is None or isinstance(part, str) for part in value)


def is_left_to_class(
    part: Component, folder: Path, takes: Mapping[str, inspect.Parameter], optional: Collection[str]
) -> bool:
    """Return whether a component of the model in `folder` has no files because the pipeline class creates it.

    Such a component has a default in `__init__`. diffusers passes the class the entry of the index and loads nothing.
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
    """Raise InputError if the index lacks a component that the pipeline class requires, or if a component has no files.

    takes: parameters of its `__init__`. optional: its `_optional_components`. parts: the components that it takes.
    """
    table = read_index(folder)
    named = [name for name, value in table.items() if name in parts or not isinstance(value, list)]
    for name, parameter in list(takes.items())[1:]:
        required = parameter.default is parameter.empty and name not in optional
        if required and parameter.kind is not parameter.VAR_KEYWORD and name not in named:
            raise InputError(f"{folder / INDEX} has no {name}, which {class_name} needs: download it again")
    # The files of a component without a folder may be next to the index.
    loose = any((folder / file).is_file() for file in _LOOSE_FILES)
    for name, part in parts.items():
        if part.folder == folder and not loose:
            raise InputError(f"{folder / name} is missing: download or copy the model again")
        if part.folder != folder and not any(part.folder.iterdir()):
            raise InputError(f"{part.folder} is empty: download or copy the model again")


_LOOSE_FILES = ("config.json", "tokenizer_config.json", "scheduler_config.json", "preprocessor_config.json")


def pipeline_class(folder: str | os.PathLike, name: str | None = None) -> type[DiffusionPipeline]:
    """Return the diffusers class called `name`, or the class in the index.

    Raises InputError for an unknown class, UnsupportedError if the code of the pipeline is in the model folder.
    """
    import diffusers
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    wanted = name or read_index(folder)["_class_name"]
    if not isinstance(wanted, str):
        raise UnsupportedError(
            f"{folder} brings its own pipeline code ({wanted}), which is not run: in Python, give pipeline_class= one "
            "of diffusers"
        )
    found = getattr(diffusers, wanted, None)
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        _refuse_dummy(found, wanted)
        known = [each for each in dir(diffusers) if each.endswith("Pipeline")]
        near = difflib.get_close_matches(wanted, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "upgrade diffusers or, in Python, give another pipeline_class"
        raise InputError(f"diffusers {diffusers.__version__} has no pipeline class {wanted!r}: {hint}")
    _refuse_dummy(found, wanted)
    return found


def component_class(component: Component) -> type:
    """Return the class of a component, found as diffusers finds it.

    Raises UnsupportedError for code in the model folder, other libraries, and classes that this installation lacks.
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
    """Return the present name of a renamed transformers class, "" if it was not renamed."""
    if library != "transformers":
        return ""
    try:
        from diffusers.utils.deprecation_utils import _maybe_remap_transformers_class as remap
    except ImportError:
        remap = {"CLIPFeatureExtractor": "CLIPImageProcessor"}.get
    return remap(name) or name.removesuffix("Fast")


def _refuse_dummy(found: object, name: str) -> None:
    """Raise UnsupportedError for the placeholder class of diffusers or transformers that replaces a class with missing
    packages."""
    backends = getattr(found, "_backends", None)
    if isinstance(found, type) and type(found).__name__ == "DummyObject" and backends:
        from shardit.loading.missing_packages import is_missing, pip_line

        lacking = [each for each in backends if is_missing(each)] or backends
        raise UnsupportedError(f"{name} needs {', '.join(lacking)}, which is not installed: {pip_line(lacking)}")
