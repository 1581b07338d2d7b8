"""Facts about a model, from a rank that has loaded it, or from its files before that."""

from __future__ import annotations

from dataclasses import dataclass

from shardit.diffusion.request.pipeline_signature import PipelineSignature


@dataclass(frozen=True)
class ModelInfo:
    """The signature of a model's pipeline, and notes for the user.

    signature_with_image: of the pipeline for requests with an image, if it is another one. bytes_read: read from files
    by this rank. held_bytes, limit_bytes: the rank's memory in use after it has loaded its share, and its limit, None
    if that is not known.
    """

    signature: PipelineSignature
    signature_with_image: PipelineSignature | None = None
    notes: tuple[str, ...] = ()
    bytes_read: int = 0
    held_bytes: int = 0
    limit_bytes: int | None = None

    @property
    def signatures(self) -> tuple[PipelineSignature, ...]:
        """The signatures of all its pipelines."""
        return (self.signature,) if self.signature_with_image is None else (self.signature, self.signature_with_image)
