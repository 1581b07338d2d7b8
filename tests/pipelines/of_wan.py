"""Wan, Lucy and SkyReels-V2: videos with `AutoencoderKLWan` and a UMT5 encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry

_CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": parts.WIDTH,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 4,
    "rope_max_seq_len": 32,
}
# Noise, the mask of given frames (4 per latent frame) and the encoded picture.
_WITH_PICTURE = 16 + 4 + 16


def transformer(cls: str = "WanTransformer3DModel", **changes: Any) -> Any:
    """A transformer of the Wan kind."""
    return parts.model(cls, **{**_CONFIG, **changes})


def steps(**config: Any) -> Any:
    """The scheduler of Wan."""
    kind = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return parts.scheduler("UniPCMultistepScheduler", **{**kind, **config})


def components(**changes: Any) -> dict[str, Any]:
    """Return the components of these pipelines."""
    return {
        "tokenizer": parts.tokenizer("t5"),
        "text_encoder": parts.t5("UMT5EncoderModel"),
        "vae": parts.wan_vae(),
        "scheduler": steps(),
        "transformer": transformer(),
        **changes,
    }


def call(**changes: Any) -> dict[str, Any]:
    """Arguments that these pipelines share."""
    return {
        "prompt": parts.PROMPT,
        "negative_prompt": "dark fog",
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "max_sequence_length": 16,
        "output_type": "np",
        **changes,
    }


def _without(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key not in names}


def image_parts(kind: Callable[..., Any] = transformer, **changes: Any) -> dict[str, Any]:
    """Components that see a picture: its encoder, and a transformer that attends to it."""
    seeing = {"image_dim": parts.WIDTH, "added_kv_proj_dim": 32, "in_channels": _WITH_PICTURE, **changes}
    return {
        "image_encoder": parts.clip_vision(projects=False),
        "image_processor": parts.clip_pictures(),
        "transformer": kind(**seeing),
    }


def _entry(name: str, made: Callable[[], dict[str, Any]], arguments: Callable[[], dict[str, Any]]) -> PipelineEntry:
    return PipelineEntry(name, lambda: parts.pipeline(name, **components(**made())), arguments)


def _video(**more: Any) -> dict[str, Any]:
    return {"video": parts.video(9, 32, 32), **call(num_inference_steps=3), **more}


def _vace() -> dict[str, Any]:
    net = transformer("WanVACETransformer3DModel", vace_layers=[0, 2], vace_in_channels=96)
    return {"transformer": net, "transformer_2": None}


def _vace_call() -> dict[str, Any]:
    frames, masks = parts.video(9, 32, 32), [parts.mask(32, 32)] * 9
    return call(video=frames, mask=masks, reference_images=[parts.picture(32, 32, seed=9)])


def _animate() -> dict[str, Any]:
    net = transformer(
        "WanAnimateTransformer3DModel",
        in_channels=_WITH_PICTURE,
        latent_channels=16,
        image_dim=parts.WIDTH,
        added_kv_proj_dim=None,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    return {**image_parts(lambda **_: net)}


def _animate_call() -> dict[str, Any]:
    videos = {"pose_video": parts.video(9, 32, 32), "face_video": parts.video(9)}
    sizes = {"segment_frame_length": 9, "prev_segment_conditioning_frames": 1}
    return {**_without(call(), "num_frames"), "image": parts.picture(32, 32), **videos, **sizes}


def _sky(**changes: Any) -> Any:
    return transformer("SkyReelsV2Transformer3DModel", **changes)


def _forcing(**changes: Any) -> dict[str, Any]:
    net = _sky(inject_sample_info=True, num_frame_per_block=1, **changes)
    return {"transformer": net, "scheduler": steps(flow_shift=8.0)}


def _forced(**more: Any) -> dict[str, Any]:
    # Two blocks of frames, one step apart; the second half begins with what the first half ends with.
    return call(num_frames=17, base_num_frames=9, overlap_history=5, ar_step=1, causal_block_size=1, **more)


ENTRIES: tuple[PipelineEntry, ...] = (
    _entry(
        "WanPipeline",
        lambda: {"transformer_2": transformer(), "boundary_ratio": 0.9},
        lambda: call(guidance_scale_2=3.0),
    ),
    _entry(
        "WanImageToVideoPipeline",
        lambda: {**image_parts(), "transformer_2": None},
        lambda: call(image=parts.picture(32, 32)),
    ),
    _entry("WanVideoToVideoPipeline", dict, lambda: _without(_video(strength=0.7), "num_frames")),
    _entry("WanVACEPipeline", _vace, _vace_call),
    _entry("WanAnimatePipeline", _animate, _animate_call),
    _entry(
        "LucyEditPipeline",
        lambda: {"transformer": transformer(in_channels=32), "transformer_2": None},
        lambda: _video(num_inference_steps=2),
    ),
    _entry("SkyReelsV2Pipeline", lambda: {"transformer": _sky()}, call),
    _entry(
        "SkyReelsV2ImageToVideoPipeline",
        lambda: image_parts(_sky),
        lambda: call(image=parts.picture(32, 32)),
    ),
    _entry("SkyReelsV2DiffusionForcingPipeline", _forcing, _forced),
    _entry(
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        _forcing,
        lambda: _forced(image=parts.picture(32, 32)),
    ),
    _entry(
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        _forcing,
        lambda: _forced(video=parts.video(5, 32, 32)),
    ),
)
