"""Classes of diffusers and transformers that tensor parallelism has rules for, as data, and their registries."""

from __future__ import annotations

import functools
from typing import Any

from shardit.core.modules.absent import Libraries
from shardit.core.modules.patching import plain_type
from shardit.diffusion.class_homes import MODELS
from shardit.parallel.attention.hook import wrapped_back_end
from shardit.parallel.tensor.rules import Experts, Family, FeedForward, FusedAttention, ParallelBlock

FEED_FORWARDS = (
    FeedForward(
        ("net.0.proj",),
        "net.2",
        whole=tuple(f"diffusers.models.activations.{name}" for name in ("GELU", "ApproximateGELU", "LinearActivation")),
        halves=tuple(f"diffusers.models.activations.{name}" for name in ("GEGLU", "SwiGLU")),
    ),
    FeedForward(("linear_1",), "linear_2", classes=("TimestepEmbedding", "PixArtAlphaTextProjection")),
)

FUSED_ATTENTIONS = (
    FusedAttention("qkv", "proj", ("VisionAttention", "Qwen2_5_VLVisionAttention", "Qwen3VLVisionAttention")),
)

KEPT_ATTENTIONS = {
    "PriorTransformer": "its mask is repeated for all heads",
}

KEPT_PROCESSORS = {"AttnAddedKVProcessor2_0": "its processor reshapes to the width of all heads"}

HEAD_TABLES = {
    "LTXVideoTransformer3DModel": ("image_rotary_emb",),
    "LTX2VideoTransformer3DModel": ("query_rotary_emb", "key_rotary_emb"),
    "SanaWMLTX2RefinerTransformer3DModel": ("query_rotary_emb", "key_rotary_emb"),
    "MochiTransformer3DModel": ("image_rotary_emb",),
}

HEAD_WIDTHS = {"OmniGenAttnProcessor2_0": ("out_dim",)}

HEAD_OUTPUTS = ("EasyAnimateAttnProcessor2_0",)

EXPERTS = (
    Experts(
        widths=("moe_intermediate_dim",),
        transposed=True,
        halves=True,
        biased=False,
        gates=True,
        normed=False,
        classes=("SwiGLUExperts",),
    ),
)

PARALLEL_BLOCKS = (
    ParallelBlock(
        "attn",
        "proj_mlp",
        "proj_out",
        "mlp_hidden_dim",
        classes=(
            "FluxSingleTransformerBlock",
            "LongCatImageSingleTransformerBlock",
            "OvisImageSingleTransformerBlock",
            "ChromaSingleTransformerBlock",
            "BriaSingleTransformerBlock",
            "BriaFiboSingleTransformerBlock",
            "HunyuanVideoSingleTransformerBlock",
            "HunyuanVideoTokenReplaceSingleTransformerBlock",
            "HunyuanImageSingleTransformerBlock",
            "MotifVideoSingleTransformerBlock",
        ),
    ),
)


@functools.cache
def look_up_plain_blocks() -> None:
    """Let step caches and layer skips of diffusers, which look up blocks by their class, find blocks of derived
    classes, too. Permanent."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    own_get: Any = TransformerBlockRegistry.get

    def get(model_class: type) -> Any:
        return own_get(plain_type(model_class))

    TransformerBlockRegistry.get = staticmethod(get)  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def wrap_attention_back_ends() -> None:
    """Hook attention functions that do not call torch's own, so that they work in sharded blocks. Permanent."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    own = {"native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math"}
    for name, function in list(registry._backends.items()):
        if name.value not in own:
            registry._backends[name] = wrapped_back_end(name.value, function)


def unload_adapters(model: Any) -> None:
    """Remove all adapters of PEFT from a model, also those that were loaded in part."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(model)
    vars(model).pop("peft_config", None)
    model._hf_peft_config_loaded = False


FAMILY = Family(
    feed_forwards=FEED_FORWARDS,
    fused_attentions=FUSED_ATTENTIONS,
    parallel_blocks=PARALLEL_BLOCKS,
    experts=EXPERTS,
    kept_attentions=KEPT_ATTENTIONS,
    kept_processors=KEPT_PROCESSORS,
    head_tables=HEAD_TABLES,
    head_widths=HEAD_WIDTHS,
    head_outputs=HEAD_OUTPUTS,
    replicates_keys=True,
    tries=True,
    rms_norms=("diffusers.models.normalization.RMSNorm",),
    processors=MODELS,
    unload_adapters=unload_adapters,
    merging="fuse_lora, unload_lora_weights",
    libraries=("transformers", "peft", "accelerate"),
    second_inputs=("encoder_hidden_states", "norm_encoder_hidden_states", "context"),
    rotary_inputs=("rope", "rotary"),
)

LIBRARIES = Libraries(
    placing=("torch.", "shardit.", "peft.", "accelerate.", "bitsandbytes."),
    own=("shardit.", "diffusers.", "transformers.", "peft.", "accelerate.", "bitsandbytes."),
)
"""Libraries that work on parameters of models."""

ADAPTER_SCALES = "attention_kwargs"
"""How the names of arguments end that give the strength of adapters for one call."""
