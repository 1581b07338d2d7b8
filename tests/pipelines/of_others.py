"""Mochi, MotifVideo, VisualCloze, LLaDA 2, RFD4-Proteina; perturbed attention on Kolors and HunyuanDiT."""

from __future__ import annotations

from typing import Any

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry
from tests.pipelines.of_controlnet_xl import kolors, kolors_call
from tests.pipelines.of_hunyuan import dit


def _call(**changes: Any) -> dict[str, Any]:
    return {
        "prompt": parts.PROMPT,
        "negative_prompt": "dark fog",
        "height": 16,
        "width": 16,
        "num_inference_steps": 2,
        "output_type": "np",
        **changes,
    }


def _mochi() -> dict[str, Any]:
    vae = parts.model(
        "AutoencoderKLMochi",
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    net = parts.like("MochiTransformer3DModel", in_channels=12, text_embed_dim=parts.WIDTH, max_sequence_length=16)
    text = {"text_encoder": parts.t5(), "tokenizer": parts.tokenizer("t5")}
    return {"transformer": net, "vae": vae, "scheduler": parts.flow(), **text}


def _motif(seeing: bool = False) -> dict[str, Any]:
    from diffusers.guiders import AdaptiveProjectedGuidance

    vision = {"hidden_size": 8, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = parts.text_model(
        "T5Gemma2Encoder",
        text_config={**parts.DECODER, "num_key_value_heads": 2, "query_pre_attn_scalar": 16, "dropout_rate": 0.0},
        vision_config={**vision, "image_size": 16, "patch_size": 4, "model_type": "siglip_vision_model"},
    )
    net = parts.like(
        "MotifVideoTransformer3DModel", in_channels=33, out_channels=16, patch_size=1, text_embed_dim=parts.WIDTH
    )
    return {
        "transformer": net,
        "vae": parts.wan_vae(),
        "scheduler": parts.flow(shift=7.0),
        "text_encoder": encoder,
        "tokenizer": parts.tokenizer("t5"),
        "guider": AdaptiveProjectedGuidance(),
        "feature_extractor": parts.siglip_pictures() if seeing else None,
    }


def _cloze() -> dict[str, Any]:
    net = parts.like(
        "FluxTransformer2DModel",
        in_channels=48,
        out_channels=16,
        joint_attention_dim=parts.WIDTH,
        pooled_projection_dim=parts.WIDTH,
    )
    return {
        "scheduler": parts.flow(),
        "text_encoder": parts.clip_text(),
        "tokenizer": parts.tokenizer("clip"),
        "text_encoder_2": parts.t5(),
        "tokenizer_2": parts.tokenizer("t5"),
        "transformer": net,
        "vae": parts.vae(shift_factor=0.06),
        "resolution": 32,
    }


def _cloze_call(**changes: Any) -> dict[str, Any]:
    def seen(seed: int) -> Any:
        return parts.picture(32, 32, seed=seed)

    task = "from [IMAGE1] a cat to [IMAGE2] a dog"
    rows = [[seen(0), seen(1)], [seen(2), None]]
    more = {"num_inference_steps": 2, "guidance_scale": 5.0, "max_sequence_length": 32, "output_type": "np"}
    return {"task_prompt": task, "content_prompt": parts.PROMPT, "image": rows, **more, **changes}


def _llada() -> dict[str, Any]:
    model = parts.decoder("LlamaForCausalLM", num_hidden_layers=4, num_key_value_heads=2)
    return {
        "model": model,
        "scheduler": parts.scheduler("BlockRefinementScheduler"),
        "tokenizer": parts.tokenizer("qwen", "qwen3"),
    }


def _llada_call() -> dict[str, Any]:
    sizes = {"gen_length": 8, "block_length": 8, "num_inference_steps": 2, "max_post_steps": 2}
    return {"prompt": parts.PROMPT, **sizes, "mask_token_id": 9, "output_type": "seq", "eos_early_stop": False}


def _hunyuan() -> Any:
    return parts.pipeline("HunyuanDiTPAGPipeline", **dit(), pag_applied_layers=["blocks.1"])


ENTRIES: tuple[PipelineEntry, ...] = (
    parts.entry("MochiPipeline", _mochi, _call, num_frames=7, guidance_scale=4.5, max_sequence_length=16),
    parts.entry("MotifVideoPipeline", _motif, _call, num_frames=9, max_sequence_length=16),
    parts.entry(
        "MotifVideoImage2VideoPipeline",
        lambda: _motif(seeing=True),
        _call,
        num_frames=9,
        max_sequence_length=16,
        image=parts.picture,
    ),
    parts.entry("VisualClozeGenerationPipeline", _cloze, _cloze_call),
    parts.entry(
        "VisualClozePipeline",
        _cloze,
        _cloze_call,
        upsampling_height=32,
        upsampling_width=32,
        upsampling_strength=0.6,
        num_inference_steps=3,
    ),
    parts.entry("LLaDA2Pipeline", _llada, _llada_call),
    parts.entry("KolorsPAGPipeline", lambda: {**kolors(), "pag_applied_layers": ["mid"]}, kolors_call, pag_scale=2.0),
    PipelineEntry("HunyuanDiTPAGPipeline", _hunyuan, lambda: _call(use_resolution_binning=False, pag_scale=2.0)),
)

NOT_BUILT = {"OmniGenPipeline": "its processor of text and images needs torchvision"}
