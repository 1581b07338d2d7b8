"""HunyuanVideo, HunyuanVideo 1.5, HunyuanImage and HunyuanDiT."""

from __future__ import annotations

from typing import Any

from shardit.models.tiny.words import VOCAB
from tests.pipelines import parts, parts_video, parts_vision
from tests.pipelines.entry import PipelineEntry

TEMPLATE = {"template": "<|im_start|>user\n{}<|im_end|>\n", "crop_start": 3}
"""The prompt's frame; the real one needs the tokenizer of Llama."""


def video(cls: str = "HunyuanVideoTransformer3DModel", channels: int = 4, **changes: Any) -> dict[str, Any]:
    """Return the components of the pipelines of HunyuanVideo."""
    transformer = parts.like(
        cls,
        in_channels=channels,
        text_embed_dim=parts.WIDTH,
        pooled_projection_dim=parts.WIDTH,
        **changes,
    )
    return {
        "transformer": transformer,
        "vae": parts_video.hunyuan_vae(),
        "text_encoder": parts.decoder("LlamaModel", num_hidden_layers=4),
        "tokenizer": parts.tokenizer("qwen", "qwen2_vl", length=128),
        "text_encoder_2": parts.clip_text(),
        "tokenizer_2": parts.tokenizer("clip"),
        "scheduler": parts.flow(shift=7.0),
    }


def framepack() -> dict[str, Any]:
    """Return the components of `HunyuanVideoFramepackPipeline`."""
    cls = "HunyuanVideoFramepackTransformer3DModel"
    pictures = {"image_encoder": parts.siglip_vision(), "feature_extractor": parts.siglip_pictures()}
    return {**video(cls, image_proj_dim=parts.WIDTH), **pictures}


HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>")
PICTURE_TOKENS = 16
ABOUT_PICTURE = (
    "<|start_header_id|>system<|end_header_id|>\n\n<image>\ndescribe<|eot_id|>\n\n"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)


def _llama_tokenizer() -> Any:
    tokenizer = parts.tokenizer("qwen", "qwen2_vl", length=128)
    tokenizer.add_tokens(list(HEADERS), special_tokens=True)
    return tokenizer


def _picture_template() -> dict[str, Any]:
    tokenizer = _llama_tokenizer()
    before = tokenizer(ABOUT_PICTURE.partition("{}")[0]).input_ids
    start = before.index(tokenizer.convert_tokens_to_ids("<image>"))
    return {
        "template": ABOUT_PICTURE,
        "crop_start": len(before),
        "image_emb_len": PICTURE_TOKENS,
        "image_emb_start": start,
        "image_emb_end": start + PICTURE_TOKENS,
    }


def from_image() -> dict[str, Any]:
    """Return the components of `HunyuanVideoImageToVideoPipeline`: text and picture through LLaVA."""
    tokenizer = _llama_tokenizer()
    encoder = parts.text_model(
        "LlavaForConditionalGeneration",
        text_config={**parts.DECODER, "num_hidden_layers": 4, "model_type": "llama"},
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "projection_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "intermediate_size": 48,
            "patch_size": 4,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    # Latents, those of the picture and a mask.
    made = video(channels=4 + 4 + 1, image_condition_type="latent_concat")
    return {**made, "text_encoder": encoder, "tokenizer": tokenizer, "image_processor": parts.clip_pictures()}


def byte_text() -> dict[str, Any]:
    """The second encoder of the newer models: glyphs of the text in quotation marks, by bytes."""
    import transformers

    return {"text_encoder_2": parts.t5(width=parts.WIDTH), "tokenizer_2": transformers.ByT5Tokenizer()}


def _guider() -> Any:
    import diffusers

    return diffusers.ClassifierFreeGuidance(guidance_scale=3.0)


def video15(image: bool = False) -> dict[str, Any]:
    """Return the components of the pipelines of HunyuanVideo 1.5."""
    transformer = parts.like(
        "HunyuanVideo15Transformer3DModel",
        in_channels=2 * 4 + 1,
        out_channels=4,
        text_embed_dim=parts.WIDTH,
        text_embed_2_dim=parts.WIDTH,
        image_embed_dim=parts.WIDTH,
        task_type="i2v" if image else "t2v",
    )
    vae = parts.model(
        "AutoencoderKLHunyuanVideo15",
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=16,
        temporal_compression_ratio=4,
    )
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = parts.text_model("Qwen2_5_VLTextModel", **{**parts.DECODER, "rope_parameters": rope, "num_hidden_layers": 4})
    made = {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": text,
        "tokenizer": parts.tokenizer("qwen", "qwen2_vl"),
        **byte_text(),
        "scheduler": parts.flow(shift=7.0),
        "guider": _guider(),
    }
    if image:
        made |= {"image_encoder": parts.siglip_vision(), "feature_extractor": parts.siglip_pictures()}
    return made


def image(refiner: bool = False) -> dict[str, Any]:
    """Return the components of the pipelines of HunyuanImage."""
    transformer = parts.like(
        "HunyuanImageTransformer2DModel",
        in_channels=16 if refiner else 4,
        out_channels=8 if refiner else 4,
        text_embed_dim=64,
        text_embed_2_dim=None if refiner else parts.WIDTH,
        patch_size=(1, 1, 1) if refiner else (1, 1),
        rope_axes_dim=(4, 6, 6) if refiner else (8, 8),
    )
    if refiner:
        config = {"latent_channels": 4, "spatial_compression_ratio": 16, "temporal_compression_ratio": 4}
        vae = parts.model("AutoencoderKLHunyuanImageRefiner", block_out_channels=(8,) * 5, layers_per_block=1, **config)
    else:
        vae = parts.model(
            "AutoencoderKLHunyuanImage",
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32, 32),
            layers_per_block=1,
            spatial_compression_ratio=4,
            sample_size=32,
            scaling_factor=0.75,
        )
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": parts_vision.qwen25_vl(),
        "tokenizer": parts.tokenizer("qwen", "qwen2_vl"),
        **({} if refiner else byte_text()),
        "scheduler": parts.flow(shift=7.0),
    }


def bert() -> Any:
    """A BERT encoder."""
    return parts.text_model(
        "BertModel",
        vocab_size=VOCAB,
        hidden_size=parts.WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
    )


def dit() -> dict[str, Any]:
    """Return the components of `HunyuanDiTPipeline`."""
    transformer = parts.like(
        "HunyuanDiT2DModel",
        cross_attention_dim=parts.WIDTH,
        cross_attention_dim_t5=parts.WIDTH,
        pooled_projection_dim=parts.WIDTH,
        text_len=77,
        text_len_t5=256,
    )
    return {
        "transformer": transformer,
        "vae": parts.vae(),
        "text_encoder": bert(),
        "tokenizer": parts.tokenizer("t5", length=77),
        "text_encoder_2": parts.t5(),
        "tokenizer_2": parts.tokenizer("t5", length=256),
        "scheduler": parts.scheduler("DDPMScheduler"),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def controlled_dit() -> dict[str, Any]:
    """The same with a ControlNet."""
    net = parts.model(
        "HunyuanDiT2DControlNetModel",
        sample_size=8,
        transformer_num_layers=6,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        hidden_size=32,
        in_channels=4,
        cross_attention_dim=parts.WIDTH,
        cross_attention_dim_t5=parts.WIDTH,
        pooled_projection_dim=parts.WIDTH,
    )
    return {**dit(), "controlnet": net}


def call(**changes: Any) -> dict[str, Any]:
    """Arguments that these pipelines share."""
    return {
        "prompt": parts.PROMPT,
        "negative_prompt": "blue",
        "num_inference_steps": 2,
        "height": 32,
        "width": 32,
        "output_type": "np",
        **changes,
    }


def _entry(name: str, make: Any, **arguments: Any) -> PipelineEntry:
    return parts.entry(name, make, call, **arguments)


VIDEO: dict[str, Any] = {"num_frames": 5, "prompt_template": TEMPLATE, "max_sequence_length": 16, "true_cfg_scale": 3.0}


def _square() -> Any:
    return parts.picture(32, 32)


ENTRIES = (
    _entry("HunyuanVideoPipeline", video, **VIDEO),
    _entry("HunyuanSkyreelsImageToVideoPipeline", lambda: video(channels=8), image=_square, **VIDEO),
    _entry("HunyuanVideoFramepackPipeline", framepack, image=_square, latent_window_size=3, **VIDEO),
    _entry(
        "HunyuanVideoImageToVideoPipeline",
        from_image,
        image=_square,
        **{**VIDEO, "prompt_template": _picture_template, "num_frames": 9},
    ),
    _entry("HunyuanVideo15Pipeline", video15, num_frames=5, prompt='a red cat says "boat"'),
    parts.entry(
        "HunyuanVideo15ImageToVideoPipeline",
        lambda: video15(image=True),
        lambda **c: {k: v for k, v in call(**c).items() if k not in ("height", "width")},
        image=_square,
        num_frames=5,
    ),
    _entry("HunyuanImagePipeline", image, prompt='a red cat says "boat"'),
    _entry("HunyuanImageRefinerPipeline", lambda: image(refiner=True), image=_square),
    _entry("HunyuanDiTPipeline", dit, height=16, width=16, use_resolution_binning=False),
    _entry(
        "HunyuanDiTControlNetPipeline",
        controlled_dit,
        height=16,
        width=16,
        control_image=parts.picture,
        use_resolution_binning=False,
    ),
)
