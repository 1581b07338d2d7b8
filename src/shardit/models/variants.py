"""Pipelines that are a second way to use the components of another one."""

from __future__ import annotations

from typing import Any


def image_pipeline(pipe: Any) -> Any:
    """A pipeline over the same components that takes an input image, where the model was made for both; else None.

    Wan2.2-TI2V's folder names WanPipeline, but with `expand_timesteps` its transformer also continues an image.
    """
    if type(pipe).__name__ != "WanPipeline" or not pipe.config.get("expand_timesteps"):
        return None
    from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline

    made = WanImageToVideoPipeline(**pipe.components, expand_timesteps=True)
    if hasattr(type(pipe), "shardit_alike"):  # its components are spread
        pipe.shardit_alike(made)
    return made
