"""Properties of a node that must be the same on all nodes, as plain data that a rank sends on arrival."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import shardit
from shardit.engine.nodes.revision import digest_of, model_revision

PACKAGES = ("shardit", "torch", "diffusers", "transformers")

OF_ONE_PROCESS = {
    *("SHARDIT_HOST", "SHARDIT_PORT", "SHARDIT_API_KEY", "SHARDIT_DATA_DIR", "SHARDIT_RAY_WAIT"),
    *("SHARDIT_PROGRESS", "SHARDIT_DEBUG", "SHARDIT_CACHE", "SHARDIT_LOG_FORMAT"),
}


def node_info(rank: int, model: str = "", flags: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the properties of this process: its identity, its packages, its files of the model, and its command-line
    flags."""
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "versions": {**versions(), "shardit sources": sources()},
        "model": model_revision(model),
        "flags": {name: str(value) for name, value in {**(flags or {}), **settings()}.items()},
    }


def settings() -> dict[str, str]:
    """Return the SHARDIT_* variables of this process that change the behaviour of ranks."""
    own = (name for name in os.environ if name.startswith("SHARDIT_") and name not in OF_ONE_PROCESS)
    return {name: os.environ[name] for name in sorted(own)}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on; imports none of them."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            if name != "shardit":  # it may be run from its source folder
                found[name] = "none"
    return found


@functools.cache
def sources() -> str:
    """Return a digest of the package's Python files: two checkouts may have the same version."""
    folder = Path(shardit.__file__).parent
    return digest_of(folder, folder.rglob("*.py"))[:12]
