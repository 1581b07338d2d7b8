"""Tiny vision-language models and their processors, built without torchvision."""

from __future__ import annotations

from typing import Any

from shardit.models.tiny.recipes.text import QWEN_VL_ENCODER, QWEN_VL_PROCESSOR
from tests.pipelines import parts

QWEN_IMAGES: dict[str, Any] = QWEN_VL_PROCESSOR.config


def processor(name: str, tokenizer: Any, image_processor: Any, **attributes: Any) -> Any:
    """A processor of transformers whose own constructor needs a video processor, and that torchvision."""
    import transformers

    cls = getattr(transformers, name)
    made = cls.__new__(cls)
    made.tokenizer, made.image_processor, made.video_processor = tokenizer, image_processor, None
    made.chat_template = getattr(tokenizer, "chat_template", None)
    for kind in ("image", "video"):
        token = f"<|{kind}_pad|>"
        setattr(made, f"{kind}_token", token)
        setattr(made, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(token))
    for key, value in attributes.items():
        setattr(made, key, value)
    return made


def qwen_pictures(**config: Any) -> Any:
    """Qwen's image processor, without torchvision."""
    import transformers

    return transformers.Qwen2VLImageProcessorPil(**{**QWEN_IMAGES, **config})


def qwen_processor(name: str = "Qwen2_5_VLProcessor", **config: Any) -> Any:
    """The processor of Qwen2.5-VL or Qwen3-VL."""
    return processor(name, parts.tokenizer("qwen", "qwen2_vl"), qwen_pictures(**config))


def qwen25_vl() -> Any:
    """Qwen2.5-VL; its text has width 64."""
    config = QWEN_VL_ENCODER.config
    text = {**config["text_config"], "num_hidden_layers": 2}
    return parts.text_model(QWEN_VL_ENCODER.cls, **{**config, "text_config": text})


def qwen3_vl(layers: int = 2, **text: Any) -> Any:
    """Qwen3-VL; its text has the width of all text here."""
    ids = {k: v for k, v in QWEN_VL_ENCODER.config.items() if k.endswith("token_id")}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True, "rope_theta": 10000.0}
    return parts.text_model(
        "Qwen3VLForConditionalGeneration",
        text_config={**parts.DECODER, "num_hidden_layers": layers, "rope_parameters": rope, **text},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": parts.WIDTH,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        tie_word_embeddings=False,
        **ids,
    )
