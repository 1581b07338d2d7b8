"""The file of a result: its extension, its folder, and what its format can hold, checked before anything is made."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardit.diffusion.request.returned import Kind
from shardit.errors import InputError
from shardit.loading.missing_packages import check_installed
from shardit.settings.paths import check_name

SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp"),
    "video": (".mp4",),
    "audio": (".wav",),
    "text": (".txt",),
    "tensors": (".safetensors",),
}
"""File extensions by kind of content; the first of each is the usual one."""

IN_WORDS: dict[Kind, str] = {
    "image": "an image",
    "video": "a video",
    "audio": "sound",
    "text": "text",
    "tensors": "numbers",
}
"""Kinds of content in messages."""

LONGEST_SIDES = {".jpg": 65500, ".jpeg": 65500, ".webp": 16383, ".mp4": 16384}
"""Largest width and height that the encoder of a format takes."""

PACKAGES = {".mp4": ("av",)}
"""Packages that write a format, except those that every result needs."""

_NO_SIZE = (None, None)


def check_path(
    path: str | os.PathLike[str],
    kind: Kind | Sequence[Kind] | None = None,
    *,
    transparent: bool = False,
    size: tuple[int | None, int | None] = _NO_SIZE,
) -> Path:
    """Check that `path` can be written, without writing it, so that nobody waits for an image that cannot be saved.

    kind: the content to save, or several of which one can be saved; None if it is not known yet. transparent: images
    have an alpha channel. size: width and height, as far as they are known. Returns the path, raises `InputError`.
    """
    target = path_of(path)
    check_name("output", target)
    suffix = target.suffix.lower()
    kinds: Any = list(SUFFIXES) if kind is None else [kind] if isinstance(kind, str) else kind
    fitting = [each for one in kinds for each in SUFFIXES[one]]
    if target.is_dir():
        raise InputError(f"output {target} is a folder; give a file name in it, such as {target / 'out'}{fitting[0]}")
    if suffix not in fitting:
        what = " or ".join(IN_WORDS[one] for one in kinds) if kind else "what pipelines make"
        raise InputError(f"output {target} does not fit {what}; use an extension among {', '.join(fitting)}")
    if transparent and suffix in (".jpg", ".jpeg"):
        raise InputError(f"output {target} would lose transparency; use .png or .webp")
    if problem := side_problem(suffix, *size):
        raise InputError(f"output {target} cannot hold it: {problem}")
    check_installed(PACKAGES.get(suffix, ()))
    if target.exists() and not target.is_file():
        raise InputError(f"output {target} is not a regular file, which alone can be replaced; choose another name")
    folder = linked(target).parent
    if not folder.is_dir():
        what = "is not a folder;" if folder.exists() else "does not exist; make it or"
        raise InputError(f"output folder {folder} {what} choose another")
    if not os.access(folder, os.W_OK):
        raise InputError(f"output folder {folder} is not writable; choose another")
    return target


def linked(target: Path) -> Path:
    """Return the file that is written for an output: if that is a symbolic link, the file to which it leads."""
    return Path(os.path.realpath(target)) if target.is_symlink() else target


def side_problem(suffix: str, width: int | None, height: int | None) -> str | None:
    """Return the error in a size that is too large for files of that extension; None if there is none."""
    most = LONGEST_SIDES.get(suffix)
    for name, side in (("width", width), ("height", height)):
        if most is not None and side is not None and side > most:
            advice = "ask for less" if suffix == ".mp4" else "use .png, or ask for less"
            return f"{suffix} has at most {most} pixels in {name}, got {side}; {advice}"
    return None


def numbered(target: Path, count: int) -> list[Path]:
    """Return the paths of `count` results that are to be saved as `target`."""
    if count == 1:
        return [target]
    return [target.with_name(f"{target.stem}-{number}{target.suffix}") for number in range(count)]


def path_of(path: object) -> Path:
    """Return the path of an output. Raises InputError for values of other types."""
    try:
        return Path(path)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"output must be a path, as in 'cat.png', got {path!r}") from None
