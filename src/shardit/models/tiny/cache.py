"""Written tiny folders, kept per user and per version of everything that they depend on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from functools import lru_cache
from pathlib import Path

from shardit.errors import InputError
from shardit.settings.paths import home_folder, user_path

PREFIX = "tiny/"


def cache_root() -> Path:
    """Return $SHARDIT_CACHE, or ~/.cache/shardit. Raises InputError."""
    value = os.environ.get("SHARDIT_CACHE")
    if value:
        return user_path("SHARDIT_CACHE", value)
    return home_folder("name a folder in SHARDIT_CACHE") / ".cache" / "shardit"


def cached_folder(name: str) -> Path:
    """Return the folder of a tiny model in the cache, written first if it is missing."""
    from shardit.models.tiny import write

    if (there := written_folder(name)) is not None:
        return there
    folder = _folder(name)
    try:
        return write(name, folder)
    except InputError as error:
        # Another process finished the same folder first: the rename makes it whole.
        if (folder / "model_index.json").is_file():
            return folder
        if not isinstance(why := error.__cause__, OSError):
            raise
        raise _not_writable(why) from error


def written_folder(name: str) -> Path | None:
    """Return the folder of a tiny model in the cache, None if it is still to be written."""
    folder = _folder(name)
    return folder if (folder / "model_index.json").is_file() else None


def _folder(name: str) -> Path:
    return cache_root() / "tiny" / f"{name}-{fingerprint()}"


def check_cache(name: str) -> None:
    """Raise InputError if a tiny model has to be written and the cache has no place for it."""
    folder = cache_root() / "tiny"
    try:
        if not any(folder.glob(f"{name}-*")):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(error) from error


def _not_writable(why: OSError) -> InputError:
    return InputError(
        f"cannot write to the cache {cache_root()} ({why.strerror or why}); name another folder in SHARDIT_CACHE"
    )


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """Changes with this package's source, its trained weights and the versions of diffusers and transformers."""
    digest, here = hashlib.sha256(), Path(__file__).parent
    for path in sorted(path for path in here.rglob("*") if path.suffix in (".py", ".safetensors")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for library in ("diffusers", "transformers"):
        digest.update(importlib.metadata.version(library).encode() + b"\0")
    return digest.hexdigest()[:12]
