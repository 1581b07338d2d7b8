"""Sound, and video with sound: ACE-Step, AudioLDM 2, Kandinsky 6."""

from __future__ import annotations

from typing import Any

import torch

from shardit.models.tiny.words import VOCAB
from tests.pipelines import parts, parts_video, parts_vision


def _ace() -> dict[str, Any]:
    encoder = parts.model(
        "diffusers.pipelines.ace_step:AceStepConditionEncoder",
        hidden_size=32,
        intermediate_size=48,
        text_hidden_dim=parts.WIDTH,
        timbre_hidden_dim=8,
        num_lyric_encoder_hidden_layers=2,
        num_timbre_encoder_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=16,
    )
    vae = parts.model(
        "AutoencoderOobleck",
        encoder_hidden_size=8,
        downsampling_ratios=[1, 2],
        decoder_channels=4,
        decoder_input_channels=8,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=50,
    )
    return {
        "transformer": parts.like(
            "AceStepTransformer1DModel",
            in_channels=24,
            num_key_value_heads=2,
            audio_acoustic_hidden_dim=8,
            encoder_hidden_size=32,
        ),
        "condition_encoder": encoder,
        "vae": vae,
        "text_encoder": parts.decoder("Qwen3Model"),
        "tokenizer": parts.tokenizer("qwen", "qwen3"),
        "scheduler": parts.flow(num_train_timesteps=1, shift=1.0),
    }


def hifi_gan() -> Any:
    """A vocoder of 16 kHz."""
    return parts.text_model(
        "SpeechT5HifiGan",
        model_in_dim=8,
        sampling_rate=16000,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
    )


def _audioldm2() -> dict[str, Any]:
    import transformers

    clap = parts.text_model(
        "ClapModel",
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "projection_dim": 32,
            "pad_token_id": 1,
        },
        audio_config={
            "spec_size": 64,
            "window_size": 4,
            "num_mel_bins": 64,
            "intermediate_size": 48,
            "depths": [2, 2],
            "num_attention_heads": [2, 2],
            "num_hidden_layers": 2,
            "hidden_size": 192,
            "projection_dim": 32,
            "patch_size": 2,
            "patch_stride": 2,
            "patch_embed_input_channels": 4,
        },
        projection_dim=32,
    )
    gpt = parts.text_model(
        "GPT2LMHeadModel", n_embd=32, n_head=2, n_layer=2, vocab_size=64, n_positions=128, max_new_tokens=4
    )
    gpt.config.max_new_tokens = 4
    unet = parts.model(
        "AudioLDM2UNet2DConditionModel",
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=([None, 32, 32], [None, 32, 32]),
    )
    projection = parts.model(
        "AudioLDM2ProjectionModel", text_encoder_dim=32, text_encoder_1_dim=parts.WIDTH, langauge_model_dim=32
    )
    return {
        "unet": unet,
        "vae": parts.vae(in_channels=1, out_channels=1),
        "text_encoder": clap,
        "text_encoder_2": parts.t5(),
        "tokenizer": parts.tokenizer("t5", length=77),
        "tokenizer_2": parts.tokenizer("t5", length=77),
        "feature_extractor": transformers.ClapFeatureExtractor(hop_length=7900, feature_size=64),
        "language_model": gpt,
        "projection_model": projection,
        "scheduler": parts.scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=False),
        "vocoder": hifi_gan(),
    }


def _kandinsky6() -> dict[str, Any]:
    transformer = parts.like(
        "Kandinsky6Transformer3DModel",
        in_text_dim=64,
        in_text_dim2=parts.WIDTH,
        visual_cond=True,
        visual_token_type_num_embeddings=2,
    )
    audio_vae = parts.model(
        "MMAudioVAE",
        mel_bins=8,
        latent_channels=4,
        hidden_channels=8,
        channel_multipliers=(1, 2),
        layers_per_block=1,
        sample_rate=64,
        n_fft=16,
        hop_length=4,
    )
    vocoder = parts.model(
        "MMAudioVocoder",
        num_mels=8,
        upsample_initial_channel=8,
        upsample_rates=(2, 2),
        upsample_kernel_sizes=(4, 4),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3),),
    )
    return {
        "transformer": transformer,
        "vae": parts_video.hunyuan_vae(),
        "text_encoder": parts_vision.qwen25_vl(),
        "tokenizer": parts_vision.qwen_processor(),
        "text_encoder_2": parts.clip_text(),
        "tokenizer_2": parts.tokenizer("clip"),
        "scheduler": parts.flow(shift=7.0),
        "audio_vae": audio_vae,
        "vocoder": vocoder,
    }


def _larger_video() -> dict[str, Any]:
    transformer = parts.like(
        "Kandinsky6SRTransformer3DModel", patch_size=(1, 1, 1), tile_sizes=((32, 32), (32, 64), (64, 32))
    )
    vae = parts.model(
        "Kandinsky6SRVAE",
        latent_channels=4,
        encoder_block_out_channels=(4, 8, 8),
        decoder_block_out_channels=(4, 8, 8),
        layers_per_block=1,
        temporal_compression_ratio=4,
        temporal_compression_start_level=0,
    )
    upscaler = parts.model(
        "Kandinsky6SRLatentUpscalerBank",
        in_channels=4,
        stage_channels=(8, 8, 4),
        num_pre_blocks=1,
        num_mid_blocks=1,
        num_post_blocks=1,
        num_x2_adapter_blocks=1,
        scales=(2, 4),
    )
    return {"transformer": transformer, "vae": vae, "scheduler": parts.flow(shift=3.5), "latent_upscaler": upscaler}


def _call(**changes: Any) -> dict[str, Any]:
    return {"prompt": parts.PROMPT, "num_inference_steps": 2, "guidance_scale": 3.0, **changes}


def _short_video() -> torch.Tensor:
    return torch.rand(5, 3, 16, 32, generator=torch.Generator().manual_seed(0))


ENTRIES = (
    parts.entry("AceStepPipeline", _ace, _call, lyrics="[verse]\nred cat", audio_duration=0.4, max_text_length=32),
    parts.entry("AudioLDM2Pipeline", _audioldm2, _call, negative_prompt="blue", max_new_tokens=4),
    parts.entry(
        "Kandinsky6TI2VAPipeline",
        _kandinsky6,
        _call,
        negative_prompt="blue",
        height=32,
        width=32,
        num_frames=5,
        max_sequence_length=32,
        output_type="pt",
        image=lambda: parts.picture(32, 32),
    ),
    parts.entry(
        "Kandinsky6SRPipeline",
        _larger_video,
        lambda **changes: {"num_inference_steps": 2, "output_type": "pt", **changes},
        video=_short_video,
        resolution_scale=2,
        tiles_batch_size=4,
    ),
)
