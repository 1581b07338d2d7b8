"""Stable Audio, Stable Audio 3 and LongCat-AudioDiT: sound from text."""

from __future__ import annotations

from typing import Any

import torch

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry


def _wave_vae() -> Any:
    """The autoencoder with the weights that it begins with: others make its sines turn too often to compare sound."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = diffusers.AutoencoderOobleck(
            encoder_hidden_size=6,
            downsampling_ratios=[1, 2],
            decoder_channels=3,
            decoder_input_channels=4,
            audio_channels=2,
            channel_multiples=[2, 4],
            sampling_rate=8,
        )
    return vae.eval()


def _stable() -> dict[str, Any]:
    projection = parts.model(
        "StableAudioProjectionModel", text_encoder_dim=parts.WIDTH, conditioning_dim=16, min_value=0, max_value=32
    )
    steps = parts.scheduler("EDMDPMSolverMultistepScheduler", prediction_type="v_prediction", sigma_data=1.0)
    return {
        "transformer": parts.like("StableAudioDiTModel", global_states_input_dim=32),
        "scheduler": steps,
        "vae": _wave_vae(),
        "text_encoder": parts.t5(),
        "tokenizer": parts.tokenizer("t5", length=16),
        "projection_model": projection,
    }


def _third() -> dict[str, Any]:
    width = 16
    net = parts.model(
        "StableAudio3DiTModel",
        io_channels=8,
        patch_size=1,
        embed_dim=32,
        depth=4,
        num_heads=4,
        cond_token_dim=width,
        global_cond_dim=width,
        local_add_cond_dim=9,
        timestep_features_dim=16,
        ff_mult=2,
        num_memory_tokens=3,
        use_differential_attention=False,
    )
    vae = parts.model(
        "AutoencoderSAME",
        audio_channels=2,
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=8,
        use_differential_attention=False,
        dim_heads=4,
        ff_mult=2,
        sampling_rate=16,
    )
    module = {**parts.DECODER, "hidden_size": width, "head_dim": 8, "query_pre_attn_scalar": 8}
    module["layer_types"] = ["full_attention"] * module["num_hidden_layers"]
    encoder = parts.text_model("T5GemmaEncoderModel", encoder=module, decoder=module, is_encoder_decoder=False)
    duration = parts.model(
        "diffusers.pipelines.stable_audio_3.modeling_stable_audio_3:StableAudio3DurationEmbedder",
        output_dim=width,
        fourier_dim=16,
    )
    return {
        "transformer": net,
        "scheduler": parts.flow(),
        "vae": vae,
        "text_encoder": encoder,
        "tokenizer": parts.tokenizer("t5", length=16),
        "duration_embedder": duration,
    }


def _longcat() -> dict[str, Any]:
    net = parts.model(
        "LongCatAudioDiTTransformer",
        dit_dim=32,
        dit_depth=4,
        dit_heads=2,
        dit_text_dim=parts.WIDTH,
        latent_dim=8,
        text_conv=False,
    )
    vae = parts.model(
        "LongCatAudioDiTVae",
        in_channels=1,
        channels=16,
        c_mults=[1, 2],
        strides=[2],
        latent_dim=8,
        encoder_latent_dim=16,
        downsampling_ratio=2,
        sample_rate=400,
    )
    text = {"text_encoder": parts.t5("UMT5EncoderModel"), "tokenizer": parts.tokenizer("t5")}
    return {"transformer": net, "vae": vae, **text}


def _wave() -> torch.Tensor:
    return torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(3)) * 0.3


def _third_call(**changes: Any) -> dict[str, Any]:
    return {"prompt": parts.PROMPT, "duration": 1.0, "num_inference_steps": 2, **changes}


ENTRIES: tuple[PipelineEntry, ...] = (
    PipelineEntry(
        "StableAudioPipeline",
        lambda: parts.pipeline("StableAudioPipeline", **_stable()),
        lambda: {
            "prompt": parts.PROMPT,
            "negative_prompt": "dark fog",
            "audio_end_in_s": 1.5,
            "num_inference_steps": 2,
            "guidance_scale": 2.0,
        },
    ),
    PipelineEntry(
        "StableAudio3Pipeline",
        lambda: parts.pipeline("StableAudio3Pipeline", **_third()),
        lambda: _third_call(negative_prompt="dark fog", guidance_scale=3.0),
    ),
    PipelineEntry(
        "StableAudio3AudioToAudioPipeline",
        lambda: parts.pipeline("StableAudio3AudioToAudioPipeline", **_third()),
        lambda: _third_call(audio=_wave(), init_noise_level=0.7),
    ),
    PipelineEntry(
        "StableAudio3InpaintPipeline",
        lambda: parts.pipeline("StableAudio3InpaintPipeline", **_third()),
        lambda: _third_call(audio=_wave(), mask_start_seconds=0.25, mask_end_seconds=0.75),
    ),
    PipelineEntry(
        "LongCatAudioDiTPipeline",
        lambda: parts.pipeline("LongCatAudioDiTPipeline", **_longcat()),
        lambda: {
            "prompt": parts.PROMPT,
            "negative_prompt": "dark fog",
            "audio_duration_s": 0.2,
            "num_inference_steps": 2,
            "guidance_scale": 4.0,
        },
    ),
)
