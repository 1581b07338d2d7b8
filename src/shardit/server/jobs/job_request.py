"""Builds the `Request` for the ranks from a job's stored request, the same each time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shardit.diffusion.request.build import build_requests
from shardit.diffusion.request.model_info import ModelInfo
from shardit.diffusion.request.request import Request

if TYPE_CHECKING:
    from shardit.diffusion.request.images import ImageSource


def build_request(request: Mapping[str, Any], seed: int, images: Sequence[ImageSource], info: ModelInfo) -> Request:
    """Build the one request of a job. request: the prompt and parameters under the names of `Omni.generate`. info:
    facts about the model. Raises InputError if they do not fit each other."""
    entry: dict[str, Any] = {**request, "seed": seed}
    if images:
        entry["pil_image"] = list(images)
    return build_requests(entry, None, takes=info.signature, takes_with_image=info.signature_with_image)[0]
