"""Tensor parallelism of language models: rules for classes of transformers, as data, and the plans made from them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from shardit.core.modules.absent import Libraries
from shardit.core.placement.slices import even
from shardit.errors import UnsupportedError, listed
from shardit.parallel.tensor.adapters import base_linears
from shardit.parallel.tensor.plan import Role, TensorPlan
from shardit.parallel.tensor.planner import plan_tensors
from shardit.parallel.tensor.rules import (
    Attention,
    ChannelStates,
    DeltaStates,
    Experts,
    Family,
    FeedForward,
    FusedAttention,
    HeadStates,
    LatentAttention,
)

LIBRARIES = Libraries(
    placing=("torch.", "shardit.", "peft.", "accelerate.", "bitsandbytes."),
    own=("shardit.", "transformers.", "peft.", "accelerate.", "bitsandbytes."),
)
"""Libraries that work on parameters of language models."""

FAMILY = Family(
    libraries=("transformers", "peft", "accelerate"),
    attentions=(
        Attention(
            query=("q_proj", "gate_proj", "g_proj"),
            key_value=("k_proj", "v_proj"),
            out=("o_proj", "out_proj", "dense"),
            query_norms=("q_norm", "q_layernorm", "query_layernorm", "qk_norm"),
            key_norms=("k_norm", "v_norm", "k_layernorm", "key_layernorm"),
            head_vectors=("sinks",),
            gated=True,
            borrows="is_kv_shared_layer",
        ),
    ),
    fused_attentions=(
        FusedAttention("query_key_value", "dense", ("GPTNeoXAttention",), by_head=True),
        FusedAttention("qkv_proj", "o_proj", ("Phi3Attention",), numbers=("config.num_attention_heads",)),
    ),
    feed_forwards=(
        FeedForward(("dense_h_to_4h",), "dense_4h_to_h", classes=("GPTNeoXMLP",)),
        FeedForward(("gate_up_proj",), "down_proj", gates=2, classes=("Phi3MLP", "GlmMLP", "Glm4MLP")),
        FeedForward(
            ("input_linear",), "output_linear", gates=2, classes=("GraniteMoeHybridMLP", "GraniteMoeSharedMLP")
        ),
        FeedForward(("up_proj",), "down_proj", classes=("ArceeMLP", "NemotronMLP", "NemotronHMLP", "Jais2MLP")),
        FeedForward(("c_fc",), "c_proj", classes=("Starcoder2MLP", "GPTNeoMLP")),
        FeedForward(("fc_in",), "fc_out", classes=("GPTJMLP",)),
    ),
    latent_attentions=(LatentAttention(),),
    experts=(
        Experts(),
        Experts(classes=("Llama4TextExperts",), transposed=True, halves=True, biased=False, gates=True, normed=False),
    ),
    channel_states=(ChannelStates(("MambaMixer", "FalconMambaMixer", "JambaMambaMixer")),),
    head_states=(
        HeadStates(
            ("Mamba2Mixer", "BambaMixer", "GraniteMoeHybridMambaLayer", "NemotronHMamba2Mixer", "FalconH1Mixer")
        ),
    ),
    delta_states=(DeltaStates(),),
    rms_norms=tuple(
        f"transformers.models.{name}RMSNorm"
        for name in (
            "olmo2.modeling_olmo2.Olmo2",
            "olmo3.modeling_olmo3.Olmo3",
            "olmoe.modeling_olmoe.Olmoe",
            "flex_olmo.modeling_flex_olmo.FlexOlmo",
            "olmo_hybrid.modeling_olmo_hybrid.OlmoHybrid",
            "minimax_m2.modeling_minimax_m2.MiniMaxM2",
        )
    ),
    replicates_keys=True,
    gathers_attentions=True,
)


def plan_decoder(model: Any, size: int) -> TensorPlan | None:
    """Return the slices of a language model's linears over `size` tensor ranks; None for one rank.

    Raises UnsupportedError if no rule matches its layers, or its heads do not fit the number of ranks.
    """
    if size == 1:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    name = None if head is None else names[id(head)]
    family = FAMILY if name is None else replace(FAMILY, gathered=(f"^{re.escape(name)}$",))
    with base_linears(model):
        plan = plan_tensors(model, size, family, must_cut=True)
    if not plan.units:
        raise UnsupportedError(
            f"tensor_parallel_size={size}: no rule matches the layers of {type(model).__name__}; use "
            "pipeline_parallel_size"
        )
    if name is not None and name not in plan.roles:  # ranks must choose tokens from bitwise equal logits
        plan.roles[name] = Role("first", even(size, size))
    return plan


def describe_replicated(model: Any, plan: TensorPlan) -> str:
    """Describe the matrices that stay whole on every tensor rank, equal layers as one, and their share of all
    parameters."""
    with base_linears(model):
        parameters = dict(model.named_parameters())
    matrices = {name: p.numel() for name, p in parameters.items() if name not in plan.cuts and p.ndim > 1}
    share = sum(matrices.values()) / max(sum(p.numel() for p in parameters.values()), 1)
    alike: dict[str, int] = {}
    for name, count in matrices.items():
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", name.removesuffix(".weight"))
        alike[kind] = alike.get(kind, 0) + count
    named = sorted(alike, key=lambda kind: -alike[kind])
    return f"{share:.1%} of the parameters are in {listed(named, 6)}, whole on every tensor rank" if named else ""
