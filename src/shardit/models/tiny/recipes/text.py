"""Tokenizers, text encoders and the vision-language processor of the tiny checkpoints."""

from __future__ import annotations

from shardit.models.tiny.recipes.recipe import Part
from shardit.models.tiny.words import QWEN_SPECIALS, VOCAB

HIDDEN = 64

# --- tokenizers ---------------------------------------------------------------------------------------------------

QWEN_TOKENIZER = Part("tokenizer", "transformers", "Qwen2Tokenizer", {"style": "qwen", "chat": "qwen2_vl"})
QWEN3_TOKENIZER = Part("tokenizer", "transformers", "Qwen2Tokenizer", {"style": "qwen", "chat": "qwen3"})
CLIP_TOKENIZER = Part("tokenizer", "transformers", "CLIPTokenizer", {"style": "clip"})
T5_TOKENIZER = Part("tokenizer", "transformers", "T5TokenizerFast", {"style": "t5"})

# --- T5 family ----------------------------------------------------------------------------------------------------

_T5 = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 8,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.0,
    "is_encoder_decoder": False,
    "use_cache": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
T5_ENCODER = Part("text", "transformers", "T5EncoderModel", _T5, shards=3)
UMT5_ENCODER = Part("text", "transformers", "UMT5EncoderModel", _T5, shards=3)


# --- CLIP ---------------------------------------------------------------------------------------------------------


def clip(cls: str, layers: int, hidden: int = 32, act: str = "quick_gelu") -> Part:
    """Return a CLIP text encoder; `CLIPTextModelWithProjection` projects to the same width."""
    config = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "projection_dim": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "hidden_act": act,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    return Part("text", "transformers", cls, config)


# --- Qwen ---------------------------------------------------------------------------------------------------------

_QWEN_LM = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": QWEN_SPECIALS.index("<|endoftext|>"),
    "eos_token_id": QWEN_SPECIALS.index("<|im_end|>"),
}
QWEN3_ENCODER = Part("text", "transformers", "Qwen3Model", {**_QWEN_LM, "head_dim": 16}, shards=3)

_QWEN_VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 56,
    "fullatt_block_indexes": [1, 3],
    "tokens_per_second": 2,
}
QWEN_VL_ENCODER = Part(
    "text",
    "transformers",
    "Qwen2_5_VLForConditionalGeneration",
    {
        "text_config": {**_QWEN_LM, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        "vision_config": _QWEN_VISION,
        "tie_word_embeddings": False,
        "image_token_id": QWEN_SPECIALS.index("<|image_pad|>"),
        "video_token_id": QWEN_SPECIALS.index("<|video_pad|>"),
        "vision_start_token_id": QWEN_SPECIALS.index("<|vision_start|>"),
        "vision_end_token_id": QWEN_SPECIALS.index("<|vision_end|>"),
    },
    shards=3,
)
# Real checkpoints allow images of 12 845 056 pixels here; this one makes at most 16 image tokens of each.
QWEN_VL_PROCESSOR = Part(
    "processor",
    "transformers",
    "Qwen2VLProcessor",
    {
        "min_pixels": 56 * 56,
        "max_pixels": 112 * 112,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    },
)
