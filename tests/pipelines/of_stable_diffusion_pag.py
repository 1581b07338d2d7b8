"""Perturbed-attention guidance on Stable Diffusion 1.5, its ControlNets and AnimateDiff."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry
from tests.pipelines.of_animatediff import animated
from tests.pipelines.of_controlnet import controlnet
from tests.pipelines.of_stable_diffusion import picture_call
from tests.pipelines.of_stable_diffusion_base import call, components, unet
from tests.pipelines.of_stable_diffusion_xl import added, xl


def _xl_controlnet() -> Any:
    return controlnet(**added(), transformer_layers_per_block=(1, 2))


def _pag(
    name: str, arguments: Callable[..., dict[str, Any]], more: Callable[[], dict[str, Any]] = dict
) -> PipelineEntry:
    def build() -> Any:
        return parts.pipeline(name, **components(**more()), pag_applied_layers=["mid", "up"])

    return PipelineEntry(name, build, lambda: arguments(pag_scale=3.0))


def _text(**more: Any) -> dict[str, Any]:
    return call(**{"negative_prompt": "dark fog", "height": 16, "width": 16, **more})


def _inpaint(**more: Any) -> dict[str, Any]:
    return picture_call(mask_image=parts.mask(), height=16, width=16, **more)


def _animate() -> Any:
    layers = ["mid.*attn1", "up.*attn1"]
    return parts.pipeline("AnimateDiffPAGPipeline", **animated(), pag_applied_layers=layers)


def _xl_pag(name: str, arguments: Callable[..., dict[str, Any]]) -> PipelineEntry:
    def build() -> Any:
        return xl(name, controlnet=_xl_controlnet(), pag_applied_layers=["mid", "up"])

    return PipelineEntry(name, build, lambda: arguments(pag_scale=3.0))


def _control(kind: Callable[..., dict[str, Any]], key: str = "control_image") -> Callable[..., dict[str, Any]]:
    return lambda **more: kind(**{key: parts.picture(seed=7)}, **more)


ENTRIES: tuple[PipelineEntry, ...] = (
    _pag("StableDiffusionPAGPipeline", _text),
    _pag("StableDiffusionPAGImg2ImgPipeline", picture_call),
    _pag("StableDiffusionPAGInpaintPipeline", _inpaint, lambda: {"unet": unet(in_channels=9)}),
    _pag("StableDiffusionControlNetPAGPipeline", _control(_text, "image"), lambda: {"controlnet": controlnet()}),
    _pag("StableDiffusionControlNetPAGInpaintPipeline", _control(_inpaint), lambda: {"controlnet": controlnet()}),
    _xl_pag("StableDiffusionXLControlNetPAGPipeline", _control(_text, "image")),
    _xl_pag("StableDiffusionXLControlNetPAGImg2ImgPipeline", _control(picture_call)),
    PipelineEntry("AnimateDiffPAGPipeline", _animate, lambda: _text(num_frames=4, pag_scale=3.0, decode_chunk_size=2)),
)
