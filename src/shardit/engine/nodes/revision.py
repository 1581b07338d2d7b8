"""Digests of the files of a model, by which two copies of it, or two times, are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

SMALL = 1 << 20
"""Size in bytes up to which a file counts with all of its content. Of a larger one SAMPLES pieces of PIECE bytes count,
at equal distances from its beginning to its end: training changes all weights."""
SAMPLES = 256
PIECE = 4096


def model_revision(model: str) -> str | None:
    """Return the digest of a model's folder or file; None for a hub id, and for a model that comes with shardit."""
    return revision_of(model) if model and not model.startswith("tiny/") else None


def revision_of(path: str | Path) -> str | None:
    """Return a digest of a file, or of a folder's file names and files; None if there is no such file or folder."""
    found = Path(path).expanduser()
    if found.is_file():
        return digest_of(found.parent, [found])
    return digest_of(found, (one for one in found.rglob("*") if one.is_file())) if found.is_dir() else None


def digest_of(folder: Path, paths: Iterable[Path]) -> str:
    """Return a digest of files and of their names relative to a folder. Hidden ones, which downloads leave behind, do
    not count."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        size = path.stat().st_size
        digest.update(f"{name.as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= SMALL:
                digest.update(file.read())
                continue
            for number in range(SAMPLES):
                file.seek((size - PIECE) * number // (SAMPLES - 1))
                digest.update(file.read(PIECE))
    return digest.hexdigest()
