"""ControlNets over Stable Diffusion 1.5."""

from __future__ import annotations

from typing import Any

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry
from tests.pipelines.of_stable_diffusion_base import UNET, call, components

NET = {key: UNET[key] for key in ("block_out_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim",
                                  "attention_head_dim", "down_block_types")}  # fmt: skip
"""Configuration of the ControlNet of the UNet; pictures are twice as large as latents."""


def controlnet(**changes: Any) -> Any:
    """A ControlNet for the UNet."""
    return parts.model("ControlNetModel", **{**NET, "conditioning_embedding_out_channels": (8, 16), **changes})


def controlled(**changes: Any) -> dict[str, Any]:
    """Components with a ControlNet."""
    return components(**{"controlnet": controlnet(), **changes})


def _two() -> dict[str, Any]:
    import diffusers

    nets = [controlnet(), controlnet(conditioning_embedding_out_channels=(4, 8))]
    return controlled(controlnet=diffusers.MultiControlNetModel(nets))


def _control(seed: int = 1) -> Any:
    return parts.picture(seed=seed)


def _entry(name: str, make: Any = controlled, **arguments: Any) -> PipelineEntry:
    return parts.entry(name, make, call, negative_prompt="blue", **arguments)


SCALE = {"controlnet_conditioning_scale": 0.8}
SOME = {"strength": 0.8, "num_inference_steps": 3}

ENTRIES = (
    _entry("StableDiffusionControlNetPipeline", image=_control, **SCALE),
    _entry("StableDiffusionControlNetImg2ImgPipeline", image=parts.picture, control_image=_control, **SCALE, **SOME),
    _entry(
        "StableDiffusionControlNetInpaintPipeline",
        _two,
        image=parts.picture,
        mask_image=parts.mask,
        control_image=lambda: [_control(1), _control(2)],
        controlnet_conditioning_scale=[0.8, 0.5],
    ),
)

NOT_BUILT = {
    "BlipDiffusionControlNetPipeline": "its Q-Former builds its own tokenizer from a name on the hub; the pipeline is"
    " kept as deprecated with BlipDiffusionPipeline, whose parts it uses",
}
