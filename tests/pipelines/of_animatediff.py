"""AnimateDiff: Stable Diffusion with motion modules."""

from __future__ import annotations

from typing import Any

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry
from tests.pipelines.of_controlnet import NET, controlnet
from tests.pipelines.of_stable_diffusion_base import call, components, unet

FRAMES = 3


def adapter(**changes: Any) -> Any:
    """The motion modules of the UNet."""
    config: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "motion_layers_per_block": 2,
        "motion_norm_num_groups": 4,
        "motion_num_attention_heads": 4,
    }
    return parts.model("MotionAdapter", **{**config, **changes})


def animated(**changes: Any) -> dict[str, Any]:
    """Components with motion modules."""
    plain = {k: v for k, v in components().items() if k != "safety_checker"}
    heads = {"attention_head_dim": (2, 2)}
    return {**plain, "unet": unet(**heads), "motion_adapter": adapter(), **changes}


def _sparse() -> dict[str, Any]:
    kinds = ("DownBlockMotion", "CrossAttnDownBlockMotion")
    net = parts.model(
        "SparseControlNetModel",
        **{**NET, "down_block_types": kinds},
        conditioning_channels=3,
        conditioning_embedding_out_channels=(8, 8),
        motion_num_attention_heads=4,
        use_simplified_condition_embedding=False,
    )
    return animated(controlnet=net)


def _controlled() -> dict[str, Any]:
    return animated(controlnet=controlnet())


def _frames() -> list[Any]:
    return parts.video(FRAMES)


def _entry(name: str, make: Any = animated, **arguments: Any) -> PipelineEntry:
    return parts.entry(name, make, call, negative_prompt="blue", **arguments)


NEW = {"num_frames": FRAMES, "height": 16, "width": 16}
OLD = {"video": _frames, "strength": 0.8, "num_inference_steps": 3}

ENTRIES = (
    _entry("AnimateDiffPipeline", **NEW),
    _entry("AnimateDiffControlNetPipeline", _controlled, conditioning_frames=_frames, **NEW),
    _entry(
        "AnimateDiffSparseControlNetPipeline",
        _sparse,
        conditioning_frames=_frames,
        controlnet_frame_indices=[0, 1, 2],
        **NEW,
    ),
    _entry("AnimateDiffVideoToVideoPipeline", **OLD),
    _entry("AnimateDiffVideoToVideoControlNetPipeline", _controlled, conditioning_frames=_frames, **OLD),
)
