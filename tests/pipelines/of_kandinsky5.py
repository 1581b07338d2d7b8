"""Kandinsky 5, whose rotated queries and keys are rounded to bfloat16 in float32 models, too."""

from __future__ import annotations

from typing import Any

from tests.pipelines import parts, parts_video, parts_vision
from tests.pipelines.entry import PipelineEntry


def components(picture: bool = False, conditioned: bool = False) -> dict[str, Any]:
    """Return the components of the pipelines of Kandinsky 5."""
    transformer = parts.like(
        "Kandinsky5Transformer3DModel",
        in_text_dim=64,
        in_text_dim2=parts.WIDTH,
        in_visual_dim=4,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        visual_cond=conditioned,
    )
    return {
        "transformer": transformer,
        "vae": parts.vae(4, (8, 8, 8, 8)) if picture else parts_video.hunyuan_vae(),
        "text_encoder": parts_vision.qwen25_vl(),
        "tokenizer": parts_vision.qwen_processor("Qwen2VLProcessor"),
        "text_encoder_2": parts.clip_text(),
        "tokenizer_2": parts.tokenizer("clip"),
        "scheduler": parts.flow(),
    }


def call(**changes: Any) -> dict[str, Any]:
    """Arguments that these pipelines share."""
    return {
        "prompt": parts.PROMPT,
        "negative_prompt": "blue",
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "height": 32,
        "width": 32,
        "output_type": "np",
        **changes,
    }


def _picture_entry(name: str, conditioned: bool = False, **arguments: Any) -> PipelineEntry:
    def build() -> Any:
        pipe = parts.pipeline(name, **components(picture=True, conditioned=conditioned))
        pipe.resolutions = [(32, 32)]  # instead of sizes of a megapixel
        return pipe

    return PipelineEntry(name, build, lambda: call(**parts.fresh(arguments)), rounded=True)


def _square() -> Any:
    return parts.picture(32, 32)


ENTRIES = (
    parts.entry("Kandinsky5T2VPipeline", components, call, rounded=True, num_frames=5),
    parts.entry(
        "Kandinsky5I2VPipeline",
        lambda: components(conditioned=True),
        call,
        rounded=True,
        image=_square,
        num_frames=21,
    ),
    _picture_entry("Kandinsky5T2IPipeline"),
    _picture_entry("Kandinsky5I2IPipeline", conditioned=True, image=_square),
)
