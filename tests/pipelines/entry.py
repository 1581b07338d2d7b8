"""Entries of the survey, and which pipeline classes of the installed diffusers need one."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class PipelineEntry:
    """One pipeline class: how it is built tiny, and one call.

    build: the plain pipeline with tiny components of the real classes, in eval mode. call: fresh arguments of one
    `__call__`. generator: whether the call takes `generator`. rounded: whether the pipeline itself rounds its result to
    8 bits, or values of its model to bfloat16. fast: whether every test run tries it.
    """

    name: str
    build: Callable[[], Any]
    call: Callable[[], dict[str, Any]]
    generator: bool = True
    rounded: bool = False
    fast: bool = False


def _modules() -> Iterator[ModuleType]:
    for info in sorted(pkgutil.iter_modules([str(Path(__file__).parent)]), key=lambda info: info.name):
        if info.name.startswith(("of_", "unbuilt_")):
            yield importlib.import_module(f"{__package__}.{info.name}")


@functools.cache
def entries() -> dict[str, PipelineEntry]:
    """All entries by the name of their class, from the `ENTRIES` of the files `of_*.py`."""
    found: dict[str, PipelineEntry] = {}
    for module in _modules():
        for entry in getattr(module, "ENTRIES", ()):
            if entry.name in found:
                raise ValueError(f"{entry.name} has two entries")
            found[entry.name] = entry
    return found


@functools.cache
def not_built() -> dict[str, str]:
    """Class name -> why it has no entry, from the `NOT_BUILT` of the files."""
    return {name: reason for module in _modules() for name, reason in getattr(module, "NOT_BUILT", {}).items()}


@functools.cache
def pipeline_classes() -> dict[str, str | None]:
    """Every pipeline class that diffusers exports -> the reason why a rule leaves it out, or None.

    The rules: classes that diffusers keeps only as deprecated, and those whose packages are not installed. Not in it
    are modular pipelines (other classes, with other calls) and the `Auto` classes (they return one of the others).
    """
    import diffusers

    found: dict[str, str | None] = {}
    for name in sorted(dir(diffusers)):
        cls = getattr(diffusers, name, None) if "Pipeline" in name else None
        if not inspect.isclass(cls) or name == "DiffusionPipeline":
            continue
        if type(cls).__name__ == "DummyObject":
            missing = [package for package in cls._backends if package not in ("torch", "transformers")]  # type: ignore
            found[name] = f"needs a package that is not installed: {' or '.join(missing)}"
        elif issubclass(cls, diffusers.DiffusionPipeline):
            found[name] = "diffusers keeps it as deprecated" if ".deprecated." in cls.__module__ else None
    return found
