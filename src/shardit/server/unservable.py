"""Models whose pipelines need what no request can hold."""

from __future__ import annotations

from shardit.diffusion.request.pipeline_signature import PipelineSignature


def unservable(takes: PipelineSignature) -> str:
    """Why no request of a pipeline could ever run; "" where requests can."""
    needed = ", ".join(takes.needed_pictures)
    if not needed:
        return ""
    return f"{takes.class_name} needs {needed}, which the server cannot take; use shardit generate or shardit.Omni"
