"""Text by diffusion: Gemma."""

from __future__ import annotations

from typing import Any

from tests.pipelines import parts


def _gemma() -> dict[str, Any]:
    model = parts.text_model(
        "DiffusionGemmaForBlockDiffusion",
        text_config={
            **parts.DECODER,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "global_head_dim": 16,
            "num_global_key_value_heads": 2,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
        },
        boi_token_id=3,
        eoi_token_id=4,
        image_token_id=6,
        canvas_length=8,
    )
    return {
        "model": model,
        "scheduler": parts.scheduler("BlockRefinementScheduler"),
        "processor": parts.tokenizer("qwen", "qwen3"),
    }


def _call(**changes: Any) -> dict[str, Any]:
    return {"prompt": parts.PROMPT, "num_inference_steps": 2, "gen_length": 8, "eos_early_stop": False, **changes}


ENTRIES = (parts.entry("DiffusionGemmaPipeline", _gemma, _call),)
