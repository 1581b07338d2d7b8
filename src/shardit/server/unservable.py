"""Detects models whose pipelines need arguments that no request can contain."""

from __future__ import annotations

from shardit.diffusion.request.pipeline_signature import PipelineSignature


def unservable(takes: PipelineSignature) -> str:
    """Return the reason why no request of a pipeline can ever run; "" if requests can."""
    needed = ", ".join(takes.needed_pictures)
    if not needed:
        return ""
    return f"{takes.class_name} needs {needed}, which the server cannot take; use shardit generate or shardit.Omni"
