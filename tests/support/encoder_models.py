"""Tiny random versions of the encoders that diffusers' pipelines name in their `__init__`: configuration and inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.support.survey_models import randomise

IDS = torch.arange(2 * 7).view(2, 7) * 73 % 1000 + 20
MASK = torch.ones(2, 7, dtype=torch.long)
MASK[1, 5:] = 0
TEXT = {"input_ids": IDS, "attention_mask": MASK}
SMALL = {
    "vocab_size": 1040,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
DECODER = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
T5 = {
    "vocab_size": 1040,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
VISION = {**SMALL, "image_size": 16, "patch_size": 8, "projection_dim": 16}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
SEEING = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)}
SPECIAL = {"image_token_id": 1001, "video_token_id": 1002, "vision_start_token_id": 1003, "vision_end_token_id": 1004}


@dataclass(frozen=True)
class Encoder:
    """A class of transformers; `config` may hold configurations of parts as dicts."""

    name: str
    config: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=lambda: TEXT)
    call: Callable[[Any, dict[str, Any]], Any] = lambda model, inputs: model(**inputs, output_hidden_states=True)

    def build(self) -> nn.Module:
        """The model with seeded weights."""
        cls = getattr(importlib.import_module("transformers"), self.name)
        torch.manual_seed(0)
        return randomise(cls(cls.config_class(**self.config)).eval())


ENCODERS = (
    Encoder("CLIPTextModel", {**SMALL, "eos_token_id": 1}),
    Encoder("CLIPTextModelWithProjection", {**SMALL, "eos_token_id": 1, "projection_dim": 16}),
    Encoder("CLIPVisionModel", VISION, PIXELS),
    Encoder("CLIPVisionModelWithProjection", VISION, PIXELS),
    Encoder("SiglipVisionModel", VISION, PIXELS),
    Encoder("T5EncoderModel", T5),
    Encoder("UMT5EncoderModel", T5),
    Encoder("BertModel", SMALL),
    Encoder("LlamaModel", DECODER),
    Encoder("LlamaForCausalLM", DECODER),
    Encoder("Qwen3Model", DECODER),
    Encoder("Qwen3ForCausalLM", DECODER),
    Encoder("GlmModel", DECODER),
    Encoder("GemmaModel", DECODER),
    Encoder("Gemma2Model", {**DECODER, "sliding_window": 4}),
    Encoder("Gemma3TextModel", {**DECODER, "sliding_window": 4}),
    Encoder("MistralModel", DECODER),
    Encoder(
        "ModernBertModel", {**SMALL, "local_attention": 4, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
    ),
    Encoder("GPT2LMHeadModel", {"vocab_size": 1040, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    Encoder(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**DECODER, "sliding_window": 4},
            "vision_config": {**VISION, "num_hidden_layers": 2},
            "mm_tokens_per_image": 4,
            "image_token_index": 1001,
            "boi_token_index": 1003,
            "eoi_token_index": 1004,
        },
    ),
    Encoder(
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {**DECODER, "rope_parameters": MROPE},
            "vision_config": {**SEEING, "out_hidden_size": 32, "intermediate_size": 48, "fullatt_block_indexes": [1]},
            **SPECIAL,
        },
    ),
    Encoder(
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**DECODER, "rope_parameters": MROPE},
            "vision_config": SEEING,
            **SPECIAL,
        },
    ),
    Encoder(
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {**DECODER, "rope_parameters": MROPE},
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "out_hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            **SPECIAL,
        },
    ),
    Encoder(
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {**DECODER, "model_type": "mistral"},
            "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8},
            "image_token_index": 1001,
        },
    ),
    Encoder(
        "LlavaForConditionalGeneration",
        {
            "text_config": {**DECODER, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "image_token_index": 1001,
        },
    ),
    Encoder("T5GemmaEncoderModel", {"encoder": DECODER, "decoder": DECODER, "is_encoder_decoder": False}),
    Encoder(
        "Gemma4ForConditionalGeneration",
        {
            "text_config": {**DECODER, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 1040},
            "vision_config": None,
            "audio_config": None,
        },
    ),
    Encoder(
        "ClapModel",
        {
            "text_config": SMALL,
            "audio_config": {
                "depths": [1, 1],
                "num_attention_heads": [2, 4],
                "patch_embeds_hidden_size": 16,
                "num_mel_bins": 16,
                "spec_size": 32,
                "patch_size": 2,
                "patch_stride": [2, 2],
                "window_size": 2,
                "hidden_size": 32,
                "num_hidden_layers": 2,
            },
            "projection_dim": 16,
        },
        call=lambda model, inputs: model.get_text_features(**inputs),
    ),
    Encoder("ClapTextModelWithProjection", {**SMALL, "projection_dim": 16}),
)
