"""LTX-2: videos with sound, their conditions, refinement and upsampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry

_WIDTH = parts.WIDTH
# Both connectors have 4 heads of this size times 4: their output is the text that the transformer sees.
_HEAD = 8


def statistics(model: Any) -> Any:
    """The autoencoder with latents' means and deviations that are not 0 and 1."""
    for name, low, high in (("latents_mean", -0.1, 0.1), ("latents_std", 0.5, 1.5)):
        buffer = getattr(model, name)
        buffer.copy_(torch.linspace(low, high, buffer.numel()).reshape(buffer.shape))
    return model


def video_vae(latents: int = 4) -> Any:
    """The video autoencoder: half as large, half as many frames."""
    vae = parts.model(
        "AutoencoderKLLTX2Video",
        latent_channels=latents,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return statistics(vae)


def _audio_vae() -> Any:
    return statistics(
        parts.model(
            "AutoencoderKLLTX2Audio",
            base_channels=4,
            output_channels=2,
            ch_mult=(1,),
            num_res_blocks=1,
            attn_resolutions=None,
            in_channels=2,
            resolution=32,
            latent_channels=2,
            norm_type="pixel",
            causality_axis="height",
            mid_block_add_attention=False,
            sample_rate=16000,
            mel_hop_length=160,
            is_causal=True,
            mel_bins=8,
        )
    )


def gemma3() -> Any:
    """Gemma 3, whose pictures are not used."""
    return parts.text_model(
        "Gemma3ForConditionalGeneration",
        text_config={**parts.DECODER, "query_pre_attn_scalar": 16, "sliding_window": 64},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        mm_tokens_per_image=4,
    )


def connectors() -> Any:
    """The module that makes text for pictures and text for sound of the encoder's layers."""
    sizes = {"num_attention_heads": 4, "attention_head_dim": _HEAD, "num_layers": 1, "num_learnable_registers": None}
    return parts.model(
        "diffusers.pipelines.ltx2:LTX2TextConnectors",
        caption_channels=_WIDTH,
        text_proj_in_factor=parts.DECODER["num_hidden_layers"] + 1,
        **{f"{of}_connector_{key}": value for of in ("video", "audio") for key, value in sizes.items()},
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )


def _transformer(**changes: Any) -> Any:
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 4,
        "audio_cross_attention_dim": 8,
        "num_layers": 4,
        "qk_norm": "rms_norm_across_heads",
        "caption_channels": _WIDTH,
        "rope_double_precision": False,
        "rope_type": "split",
    }
    return parts.model("LTX2VideoTransformer3DModel", **{**config, **changes})


def components(drop: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    """Return the components of these pipelines."""
    vocoder = parts.model(
        "diffusers.pipelines.ltx2.vocoder:LTX2Vocoder",
        in_channels=16,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        leaky_relu_negative_slope=0.1,
        output_sampling_rate=16000,
    )
    made = {
        "transformer": _transformer(),
        "vae": video_vae(),
        "audio_vae": _audio_vae(),
        "scheduler": parts.flow(),
        "text_encoder": gemma3(),
        "tokenizer": parts.tokenizer("t5"),
        "connectors": connectors(),
        "vocoder": vocoder,
        "processor": None,
        "prompt_enhancer": None,
        "duration_head": None,
        **changes,
    }
    return {key: value for key, value in made.items() if key not in drop}


def call(**changes: Any) -> dict[str, Any]:
    """Arguments that these pipelines share: guidance by text, by the other stream, and by blocks left out."""
    return {
        "prompt": parts.PROMPT,
        "negative_prompt": "dark fog",
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "spatio_temporal_guidance_blocks": [1],
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "frame_rate": 25.0,
        "max_sequence_length": 16,
        "output_type": "np",
        **changes,
    }


def _condition(index: int = 0) -> Any:
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    return LTX2VideoCondition(frames=parts.picture(32, 32), index=index, strength=1.0, crf=0)


def _reference(module: str, name: str) -> Any:
    import importlib

    return getattr(importlib.import_module(module), name)(frames=parts.video(5, 32, 32), strength=1.0)


def _hdr_call() -> dict[str, Any]:
    seen = _reference("diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora", "LTX2HDRReferenceCondition")
    return {**call(reference_conditions=[seen]), "output_type": "pt"}


def _in_context() -> dict[str, Any]:
    seen = _reference("diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora", "LTX2ReferenceCondition")
    return call(reference_conditions=[seen], conditions=[_condition()])


def upsampler(**changes: Any) -> Any:
    """A network that makes latents larger."""
    config = {"in_channels": 4, "mid_channels": 32, "num_blocks_per_stage": 1, **changes}
    return parts.model("diffusers.pipelines.ltx2.latent_upsampler:LTX2LatentUpsamplerModel", **config)


def _frames_parts(**changes: Any) -> dict[str, Any]:
    keyframes = _transformer(vae_scale_factors=(2, 2, 2), use_keyframes_abs_pos_embedding=True)
    return components(transformer=keyframes, **changes)


def _frames_call(**changes: Any) -> dict[str, Any]:
    made = call(num_frames=9, sigmas=[1.0, 0.5], use_cross_timestep=False, **changes)
    keys = ("negative_prompt", "num_inference_steps", "guidance_scale", "spatio_temporal_guidance_blocks")
    return {key: value for key, value in made.items() if key not in keys}


def _refined() -> dict[str, Any]:
    temporal = upsampler(dims=3, spatial_upsample=False, temporal_upsample=True)
    steps = parts.scheduler("LTXEulerAncestralRFScheduler", eta=0.5)
    drop = ("processor", "prompt_enhancer", "duration_head")
    return _frames_parts(drop=drop, temporal_latent_upsampler=temporal, scheduler=steps)


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _refined_call() -> dict[str, Any]:
    latents = {"latents": _normal(1, 4, 5, 16, 16), "keyframes_latents": _normal(1, 4, 1, 16, 16)}
    return _frames_call(**latents, keyframe_positions=[8], audio_latents=_normal(1, 2, 8, 2))


def _decoder() -> dict[str, Any]:
    decoder = parts.model(
        "LTX2VideoDiffusionDecoderModel",
        out_channels=3,
        latent_channels=8,
        patch_size=2,
        decoder_head_dim=16,
        decoder_stage_channels=(64, 32, 16, 16, 16),
        decoder_stage_depths=(1, 1, 1, 1, 2),
        decoder_stage_kernels=((3, 3, 3),) * 4,
        decoder_upsample_strides=((1, 2, 2), (2, 1, 1), (2, 2, 2), (2, 2, 2)),
        decoder_upsample_channel_reductions=(2, 2, 1, 1),
        decoder_stage5_kernel=(3, 3, 3),
        decoder_t_emb_dim=32,
        spatial_compression_ratio=16,
        temporal_compression_ratio=8,
    )
    return {"diffusion_decoder": statistics(decoder), "scheduler": parts.flow(), "vae": None}


def _entry(name: str, made: Callable[[], dict[str, Any]], arguments: Callable[[], dict[str, Any]]) -> PipelineEntry:
    return PipelineEntry(name, lambda: parts.pipeline(name, **made()), arguments)


ENTRIES: tuple[PipelineEntry, ...] = (
    _entry("LTX2Pipeline", components, call),
    _entry("LTX2ImageToVideoPipeline", components, lambda: call(image=parts.picture(32, 32))),
    _entry("LTX2ConditionPipeline", components, lambda: call(conditions=[_condition(), _condition(2)])),
    _entry("LTX2InContextPipeline", lambda: components(("duration_head",)), _in_context),
    _entry("LTX2HDRPipeline", lambda: components(("processor", "prompt_enhancer", "duration_head")), _hdr_call),
    _entry("LTX2DFRPipeline", _frames_parts, _frames_call),
    _entry("LTX2DFRTemporalRefinePipeline", _refined, _refined_call),
    _entry(
        "LTX2LatentUpsamplePipeline",
        lambda: {"vae": video_vae(), "latent_upsampler": upsampler()},
        lambda: {"video": parts.video(5, 32, 32), "height": 32, "width": 32, "num_frames": 5, "output_type": "np"},
    ),
    _entry(
        "LTX2VideoDiffusionDecodePipeline", _decoder, lambda: {"latents": _normal(1, 8, 2, 3, 3), "output_type": "np"}
    ),
)
