"""A digest of the files of a model, and its commit on the hub, by which a resumed run knows whether it is the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from shardit.language.loading.source import CONFIG
from shardit.loading.hub import cached
from shardit.loading.index import INDEX
from shardit.settings.paths import is_hub_id, user_path

_ENDINGS = (".json", ".safetensors", ".gguf")
_BLOCKS, _BYTES = 16, 1 << 16


def snapshot_of(model: str) -> Path | None:
    """Return the folder of the hub's cache from which a hub id is loaded, whose name is the commit; None for other
    names. Loading has asked the hub for the newest commit, so it is that of the cache."""
    if model.startswith("tiny/") or user_path("model", model).exists() or not is_hub_id(model):
        return None
    found = cached(model, INDEX) or cached(model, CONFIG)
    return found and found.parent


def contents_of(model: str) -> str | None:
    """Return a digest of the configurations and weights of a folder, a file or a hub id; None for other names. Of a
    large file some blocks are read, with its beginning and its end: other weights of the same shapes differ in all of
    them."""
    path = snapshot_of(model) or user_path("model", model)
    if model.startswith("tiny/") or not path.exists():
        return None
    files = [path] if path.is_file() else sorted(one for one in _files(path) if one.suffix in _ENDINGS)
    total = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        total.update(f"{'' if file == path else file.relative_to(path).as_posix()}\0{size}\0".encode())
        with open(file, "rb") as opened:
            for number in range(_BLOCKS):
                opened.seek(max(size - _BYTES, 0) * number // (_BLOCKS - 1))
                total.update(opened.read(_BYTES))
    return total.hexdigest()[:32]


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a model and of its components. Other folders below it may be outputs of runs, which grow."""
    index = folder / "model_index.json"
    parts = json.loads(index.read_text("utf-8")) if index.is_file() else {}
    for place in (folder, *(folder / name for name in parts if (folder / name).is_dir())):
        yield from (one for one in place.iterdir() if one.is_file())
