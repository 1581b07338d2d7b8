"""Detects models of which no request can run: for arguments that none can contain, or for a missing package."""

from __future__ import annotations

from shardit.diffusion.request.pipeline_signature import PipelineSignature
from shardit.loading.missing_packages import is_missing


def unservable(takes: PipelineSignature) -> str:
    """Return the reason why no request of a pipeline can ever run; "" if requests can."""
    if takes.kind == "video" and is_missing("av"):
        return f"{takes.class_name} makes videos, which the module av writes, and it is not installed; pip install av"
    needed = ", ".join(takes.needed_images)
    if not needed:
        return ""
    return f"{takes.class_name} needs {needed}, which the server cannot take; use shardit generate or shardit.Omni"
