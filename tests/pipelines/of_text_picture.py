"""AuraFlow, HiDream and GLM-Image."""

from __future__ import annotations

from typing import Any

from shardit.models.tiny.words import VOCAB
from tests.pipelines import parts, parts_vision
from tests.pipelines.entry import PipelineEntry


def _aura() -> dict[str, Any]:
    return {
        "transformer": parts.like("AuraFlowTransformer2DModel", joint_attention_dim=parts.WIDTH),
        "vae": parts.vae(),
        "text_encoder": parts.t5("UMT5EncoderModel"),
        "tokenizer": parts.tokenizer("t5"),
        "scheduler": parts.flow(),
    }


def _hidream() -> dict[str, Any]:
    transformer = parts.like(
        "HiDreamImageTransformer2DModel", caption_channels=[parts.WIDTH, parts.WIDTH], text_emb_dim=2 * parts.WIDTH
    )
    return {
        "transformer": transformer,
        "vae": parts.vae(shift_factor=0.1),
        "text_encoder": parts.clip_text(projects=True),
        "tokenizer": parts.tokenizer("clip"),
        "text_encoder_2": parts.clip_text(projects=True),
        "tokenizer_2": parts.tokenizer("clip"),
        "text_encoder_3": parts.t5(),
        "tokenizer_3": parts.tokenizer("t5"),
        "text_encoder_4": parts.decoder("LlamaForCausalLM", num_hidden_layers=3),
        "tokenizer_4": parts.tokenizer("qwen", "qwen3", length=128),
        "scheduler": parts.flow(),
    }


def _call(**changes: Any) -> dict[str, Any]:
    base = {"prompt": parts.PROMPT, "negative_prompt": "blue", "num_inference_steps": 2, "guidance_scale": 3.0}
    return {**base, "height": 16, "width": 16, "max_sequence_length": 16, "output_type": "np", **changes}


def _hidream_pipe() -> Any:
    pipe = parts.pipeline("HiDreamImagePipeline", **_hidream())
    pipe.default_sample_size = 8  # pictures are brought to this area
    return pipe


GLM_TOKENS = {
    "image_token": "<|image|>",
    "grid_bos_token": "<sop>",
    "grid_eos_token": "<eop>",
    "bos_token": "<|dit_token_16384|>",
}


def _glm() -> dict[str, Any]:
    tokenizer = parts.tokenizer("qwen", "qwen2_vl")
    tokenizer.add_tokens([*GLM_TOKENS.values(), "<|image_start|>", "<|image_end|>"], special_tokens=True)
    tokens = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in GLM_TOKENS.items()}
    processor = parts_vision.processor("GlmImageProcessor", tokenizer, None)
    for name, token in GLM_TOKENS.items():
        setattr(processor, name, token)
    processor.image_token_id = tokens["image_token_id"]
    encoder = parts.text_model(
        "GlmImageForConditionalGeneration",
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "vision_vocab_size": 128,
            "rope_parameters": {"mrope_section": (4, 2, 2), "rope_type": "default", "rope_theta": 10000.0},
            "pad_token_id": 0,
            "eos_token_id": 0,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "intermediate_size": 48,
        },
        vq_config={"embed_dim": 32, "num_embeddings": 128, "latent_channels": 32},
        image_token_id=tokens["image_token_id"],
        image_start_token_id=tokenizer.convert_tokens_to_ids("<|image_start|>"),
        image_end_token_id=tokenizer.convert_tokens_to_ids("<|image_end|>"),
    )
    encoder.generation_config.eos_token_id = None  # the real one has an id that the head for pictures cannot give
    transformer = parts.like(
        "GlmImageTransformer2DModel", text_embed_dim=parts.WIDTH, prior_vq_quantizer_codebook_size=128, patch_size=2
    )
    return {
        "transformer": transformer,
        "vae": parts.vae(4, (4, 8, 8, 8), latents_mean=[0.1] * 4, latents_std=[1.2] * 4),
        "text_encoder": parts.t5(),
        "tokenizer": parts.tokenizer("t5"),
        "processor": processor,
        "vision_language_encoder": encoder,
        "scheduler": parts.flow(),
    }


def _glm_call(**changes: Any) -> dict[str, Any]:
    return {k: v for k, v in _call(**changes).items() if k != "negative_prompt"}


ENTRIES = (
    parts.entry("AuraFlowPipeline", _aura, _call),
    PipelineEntry("HiDreamImagePipeline", _hidream_pipe, _call),
    parts.entry("GlmImagePipeline", _glm, _glm_call, height=32, width=32),
)
