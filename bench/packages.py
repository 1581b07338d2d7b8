"""Parts of packages that are made for GPUs, imported on a CPU."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock


def missing(modules: tuple[str, ...]) -> list[str]:
    """Which of these top-level modules are not installed. Imports none of them."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def without_init(*names: str) -> None:
    """Let these packages be imported without their `__init__`, which imports everything that they offer."""
    for name in names:
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            if spec is None or spec.submodule_search_locations is None:
                raise ModuleNotFoundError(f"no package {name}", name=name)
            sys.modules[name] = package = types.ModuleType(name)
            package.__path__ = list(spec.submodule_search_locations)
            package.__spec__ = spec
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, package)


@contextlib.contextmanager
def placeholder_triton() -> Iterator[None]:
    """Let `import triton` succeed while modules with kernels for GPUs, which are never called, are imported."""
    from torch.utils._triton import has_triton_package

    if has_triton_package():  # asked before, as torch keeps the answer
        yield
        return
    triton = mock.MagicMock()
    added = {"triton": triton, "triton.language": triton.language}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def placeholders(packages: tuple[str, ...], names: dict[str, dict[str, Any]]) -> None:
    """Let all modules of these packages be imported from now on: `names` has their contents, by module.

    Any other name is an empty class.
    """
    if not any(isinstance(finder, _Placeholders) and finder.packages == packages for finder in sys.meta_path):
        sys.meta_path.insert(0, _Placeholders(packages, names))


class _Placeholders(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: tuple[str, ...], names: dict[str, dict[str, Any]]):
        self.packages, self.names = packages, names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        ours = any(f"{name}.".startswith(f"{package}.") for package in self.packages)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: Any) -> Any:
        module = _Module(spec.name)
        module.__dict__.update(self.names.get(spec.name, {}))
        return module

    def exec_module(self, module: Any) -> None:
        pass


class _Empty(type):
    """A class whose attributes are further such classes."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name, (), {})


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.__dict__[name] = found = _Empty(name, (), {})
        return found
