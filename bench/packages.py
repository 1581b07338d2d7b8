"""Parts of packages that are made for GPUs, imported on a CPU."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator
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
