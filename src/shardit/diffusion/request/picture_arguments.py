"""Arguments of pipelines that are pictures or videos, given as files."""

from __future__ import annotations

from typing import Any

from shardit.diffusion.request.images import is_file, open_image, open_video
from shardit.diffusion.request.pipeline_signature import is_video
from shardit.errors import InputError


def open_pictures(name: str, value: Any) -> Any:
    """A picture argument with paths and bytes in it read: as a picture, or as a list of frames where it is a video by
    its name. Pictures, tensors and the like stay as they are. Raises InputError."""
    try:
        if is_file(value):
            return open_video(value) if is_video(name) else open_image(value)
        if isinstance(value, (list, tuple)):
            return [open_image(entry) if is_file(entry) else entry for entry in value]
        return value
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
