"""What a saved file says of how it was made, and the flags that make it again."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from shardit.errors import InputError

# Entries of a record that are not arguments of the pipeline.
_ABOUT = ("software", "pipeline", "revision", "versions", "made", "input_image_sizes", "sample_rate")
# How `Request.settings` writes values that are numbers in memory, which no file holds.
_NUMBERS = re.compile(r"(Tensor|ndarray)\(")


def read_record(path: Path) -> dict[str, Any]:
    """The record in a file's metadata (`Output.record`). Raises InputError where the file holds none."""
    if not path.is_file():
        raise InputError(f"there is no file {path}; give one that shardit has written")
    try:
        record = json.loads(_text(path))
    except Exception as error:  # of a file that somebody else wrote, whatever its reader raises
        raise InputError(
            f"{path} does not say how it was made: shardit has not written it, or it was edited"
        ) from error
    if not isinstance(record, dict) or record.get("software") != "shardit" or "model" not in record:
        raise InputError(f"{path} does not say of which model it was made; give the settings as flags")
    return record


def flags_of(record: Mapping[str, Any], known: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flags that make a file again, and further arguments for --extra; `known` are the names of all flags.

    Raises InputError for what a file cannot hold.
    """
    flags: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for name, value in record.items():
        if name in _ABOUT or value is None:
            continue
        if isinstance(value, str) and _NUMBERS.match(value):
            raise InputError(
                f"the file was made with {name} given as numbers, which it does not hold; use shardit.Omni"
            )
        if name == "dtype" and isinstance(value, dict):
            value = ",".join(f"{component}={dtype}" for component, dtype in value.items())
        (flags if name in known else extra)[name] = value
    return flags, extra


def differences(record: Mapping[str, Any], versions: Mapping[str, str]) -> list[str]:
    """Packages whose versions are not those that the file was made with: its pixels may differ."""
    before = record.get("versions") or {}
    return [
        f"the file was made with {name} {before[name]}, here is {versions.get(name, 'none')}: pixels may differ"
        for name in before
        if before[name] != versions.get(name)
    ]


def _text(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in (".png", ".jpg", ".jpeg", ".webp"):
        from PIL import Image

        from shardit.encode import EXIF_DESCRIPTION

        with Image.open(path) as picture:
            picture.load()  # text may follow the pixels
            return picture.info["settings"] if suffix == ".png" else picture.getexif()[EXIF_DESCRIPTION]
    if suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            return (file.metadata() or {})["settings"]
    import av

    with av.open(str(path)) as container:
        return container.metadata["comment"]
