"""Tiny vision-language models and prompts with images for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from tests.language import families

IMAGE, BEGIN, END = 120, 122, 123
"""Tokens of an image, and of its beginning and end."""

_TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


def _qwen() -> Any:
    text = {**_TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32}
    sizes = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16}
    tokens = {"image_token_id": IMAGE, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
    config = Qwen2_5_VLConfig(
        text_config={**text, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        vision_config={**vision, **sizes, "fullatt_block_indexes": [1], "in_channels": 3},
        video_token_id=121,
        **tokens,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _gemma() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config={**_TEXT, "sliding_window": 8, "query_pre_attn_scalar": 8},
        vision_config={**vision, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
    )
    return Gemma3ForConditionalGeneration(config)


def _mllama() -> Any:
    text = {**_TEXT, "cross_attention_layers": [1, 3], "rope_scaling": None}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 2}
    heads = {"attention_heads": 4, "num_attention_heads": 4, "intermediate_layers_indices": [0, 1]}
    tiles = {"max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]], "vision_output_dim": 48}
    config = MllamaConfig(
        text_config={**text, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        vision_config={**vision, **heads, **tiles, "image_size": 16, "patch_size": 8},
        image_token_index=IMAGE,
    )
    return MllamaForConditionalGeneration(config)


BUILD = {"qwen2_5_vl": _qwen, "gemma3": _gemma, "mllama": _mllama}
"""By family."""


def make(family: str) -> Any:
    """Return a random model, as `families.make` does."""
    torch.manual_seed(0)
    return families.prepared(BUILD[family]())


def prompts(family: str, images: bool = True, padding: int = 0) -> dict[str, torch.Tensor]:
    """Return two prompts, each with an image of four tokens if `images`; padding: tokens on the left of the first."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 110, (2, 14 + padding), generator=draw)
    mask = torch.ones_like(ids)
    ids[0, :padding] = mask[0, :padding] = 0
    found = {"input_ids": ids, "attention_mask": mask}
    if not images:
        return found
    ids[:, padding + 2], ids[:, padding + 7] = BEGIN, END
    ids[:, padding + 3 : padding + 7] = IMAGE
    if family == "gemma3":
        pixels = torch.randn(2, 3, 16, 16, generator=draw)
        return {**found, "pixel_values": pixels, "token_type_ids": (ids == IMAGE).long()}
    if family == "mllama":
        return {
            **found,
            "pixel_values": torch.randn(2, 1, 2, 3, 16, 16, generator=draw),
            "aspect_ratio_ids": torch.full((2, 1), 2),
            "aspect_ratio_mask": torch.ones(2, 1, 2, dtype=torch.long),
            "cross_attention_mask": torch.ones(*ids.shape, 1, 2, dtype=torch.long),
        }
    return {
        **found,
        "pixel_values": torch.randn(32, 3 * 2 * 4 * 4, generator=draw),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def generate(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    """Return six tokens for each prompt, and the logits of each step."""
    torch.manual_seed(3)
    asked = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**inputs, **{**asked, **options})
