"""Second pipelines over the components of another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def image_pipeline_name(class_name: str, config: Mapping[str, Any]) -> str | None:
    """Return the class of the second pipeline of a model that was made for text and for images, or None.

    Wan2.2-TI2V's folder names WanPipeline, but with `expand_timesteps` its transformer also continues an image.
    """
    return "WanImageToVideoPipeline" if class_name == "WanPipeline" and config.get("expand_timesteps") else None


def image_pipeline(pipe: Any) -> Any:
    """Return a pipeline over the same components that takes an input image, if the model was made for both; else
    None."""
    if image_pipeline_name(type(pipe).__name__, pipe.config) is None:
        return None
    from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline

    return WanImageToVideoPipeline(**pipe.components, expand_timesteps=True)
