"""Reads arguments of pipelines that are images or videos, given as files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL.Image import Image

from shardit.diffusion.request.images import is_file, open_image, open_video
from shardit.diffusion.request.pipeline_signature import PipelineSignature, is_mask_of_video, is_video
from shardit.errors import InputError

OPAQUE = ("mask", "control")
"""Words in the names of arguments whose images are drawn in white on nothing."""


def open_images(given: Mapping[str, Any], takes: PipelineSignature) -> dict[str, Any]:
    """Return the given image arguments, with paths and bytes in them read: as images, or as lists of frames. If a
    pipeline wants a list, one image becomes a list of one, and a mask is repeated for all frames.

    Frames of a video become RGB; other images, tensors and similar values are not changed. Raises InputError.
    """
    found = {name: _opened(name, given[name], takes) for name in takes.images if name in given}
    videos = [value for name, value in found.items() if is_video(name) and isinstance(value, list)]
    for name, value in found.items():
        one = isinstance(value, list) and len(value) == 1 and not isinstance(given[name], (list, tuple))
        if one and videos and is_mask_of_video(name, takes):
            found[name] = [value[0]] * len(videos[0])
    return found


def _check(value: Any) -> None:
    """Raise InputError for plain values that are no image, as JSON may have them, and for open files."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    if not len(parts) or any(isinstance(part, (bool, int, float, Mapping)) or hasattr(part, "read") for part in parts):
        raise InputError(f"must be an image, the path of one or a list of these, got {value!r:.60}")


def _has_to_be_opened(name: str, entry: Any) -> bool:
    """Return whether an entry of a list is a file, or a frame of a video whose mode is not that of frames in files."""
    return is_file(entry) or (is_video(name) and isinstance(entry, Image) and entry.mode != "RGB")


def _opened(name: str, value: Any, takes: PipelineSignature) -> Any:
    try:
        _check(value)
        if is_file(value) and (is_video(name) or is_mask_of_video(name, takes)):
            return open_video(value)
        mode = "opaque" if any(word in name for word in OPAQUE) else "RGB"
        if isinstance(value, (list, tuple)):
            return [open_image(entry, mode) if _has_to_be_opened(name, entry) else entry for entry in value]
        image = open_image(value, mode) if is_file(value) else value
        return [image] if name in takes.listed and isinstance(image, Image) else image
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
