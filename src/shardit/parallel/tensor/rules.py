"""What tensor parallelism knows of models: names of children, as data. A new naming convention is a new entry here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attention:
    """Names of the parts of an attention module.

    query, key_value: linears cut by columns at heads (a gate on what comes out of the heads is like a query); out:
    linears cut by rows. query_norms, key_norms: norms over one head (kept) or over all (cut). per_head: tables with a
    column for each head. full_input: parts that see what comes before the heads, and so are kept. Any other part with
    parameters makes the module unknown: it is left whole.
    """

    query: tuple[str, ...]
    key_value: tuple[str, ...]
    out: tuple[str, ...]
    query_norms: tuple[str, ...] = ()
    key_norms: tuple[str, ...] = ()
    per_head: tuple[str, ...] = ()
    full_input: tuple[str, ...] = ()


ATTENTIONS = (
    Attention(  # diffusers
        query=("to_q", "add_q_proj", "to_gate"),
        key_value=("to_k", "to_v", "add_k_proj", "add_v_proj"),
        out=("to_out.0", "to_out", "to_add_out"),
        query_norms=("norm_q", "norm_added_q"),
        key_norms=("norm_k", "norm_added_k"),
        full_input=("norm_cross", "group_norm"),
    ),
    Attention(  # Llama, Qwen, CLIP and their like
        query=("q_proj",),
        key_value=("k_proj", "v_proj"),
        out=("o_proj", "out_proj"),
        query_norms=("q_norm",),
        key_norms=("k_norm", "v_norm"),
    ),
    Attention(query=("q",), key_value=("k", "v"), out=("o",), per_head=("relative_attention_bias",)),  # T5
    Attention(  # Kandinsky 5
        query=("to_query",),
        key_value=("to_key", "to_value"),
        out=("out_layer",),
        query_norms=("query_norm",),
        key_norms=("key_norm",),
    ),
)


@dataclass(frozen=True)
class FusedAttention:
    """Attention whose queries, keys and values come from one linear, in three parts of equal size.

    classes: those known to have the parts in that order; shapes alone do not tell.
    """

    into: str
    out: str
    classes: tuple[str, ...]


FUSED_ATTENTIONS = (
    FusedAttention("qkv", "proj", ("VisionAttention", "Qwen2_5_VLVisionAttention", "Qwen3VLVisionAttention")),
)

KEPT_ATTENTION = {
    "LTXVideoTransformer3DModel": "its rotary tables span all heads",
    "LTX2VideoTransformer3DModel": "its rotary tables span all heads",
    "SanaWMLTX2RefinerTransformer3DModel": "its rotary tables span all heads",
    "MochiTransformer3DModel": "its rotary tables differ by head",
    "PriorTransformer": "its mask is repeated for all heads",
    "OmniGenTransformer2DModel": "it reshapes to the width of all heads",
    "EasyAnimateTransformer3DModel": "one of its outputs passes no linear",
}
"""Models whose attention is left whole, and why: other code of theirs counts on all heads."""

KEPT_PROCESSORS = {"AttnAddedKVProcessor2_0": "its processor reshapes to the width of all heads"}
"""The same of classes of attention processors."""

HEAD_SIZES = ("head_dim", "key_value_proj_dim")
"""Attributes that give the channels of one head; without them they follow from the number of heads."""

HEAD_COUNTS = ("heads", "num_heads", "n_heads", "num_attention_heads")
"""Attributes that hold the number of query heads; those that are there are set to this rank's."""

KEY_HEAD_COUNTS = ("kv_heads", "num_kv_heads", "num_key_value_heads")
"""The same of key and value heads."""

QUERY_WIDTHS = ("inner_dim",)
"""Attributes that hold the channels of all query heads."""

KEY_WIDTHS = ("inner_kv_dim", "kv_inner_dim")
"""The same of key and value heads."""


@dataclass(frozen=True)
class FeedForward:
    """Linears cut by columns, whose outputs are combined element by element, and the one cut by rows behind them.

    halves: full names of classes of the parent of `into[0]` whose output is split into two halves that are multiplied;
    whole: those of such parents that do not split. Empty: `into` are children of the module itself.
    classes: the classes that the entry is for (empty: any).
    """

    into: tuple[str, ...]
    out: str
    whole: tuple[str, ...] = ()
    halves: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


FEED_FORWARDS = (
    FeedForward(
        ("net.0.proj",),
        "net.2",
        whole=tuple(f"diffusers.models.activations.{name}" for name in ("GELU", "ApproximateGELU", "LinearActivation")),
        halves=tuple(f"diffusers.models.activations.{name}" for name in ("GEGLU", "SwiGLU")),
    ),
    FeedForward(("w1", "w3"), "w2"),
    FeedForward(("gate_proj", "up_proj"), "down_proj"),
    FeedForward(("gate", "up"), "down"),
    FeedForward(("wi_0", "wi_1"), "wo"),
    FeedForward(("wi",), "wo"),
    FeedForward(("fc1",), "fc2"),
    FeedForward(("in_layer",), "out_layer"),
    FeedForward(("linear_1",), "linear_2", classes=("TimestepEmbedding", "PixArtAlphaTextProjection")),
)

FEED_FORWARD_KEPT = ("cond_proj",)
"""Parts of feed-forward modules that come before the first linear."""

ELEMENTWISE = (
    *(f"torch.nn.modules.activation.{name}" for name in ("SiLU", "GELU", "ReLU", "Tanh")),
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.dropout.Dropout",
)
"""Modules of torch that act on each element alone."""

EMBEDDING = "torch.nn.modules.sparse.Embedding"
"""The table whose rows can be dealt."""

RMS_NORMS = ("torch.nn.modules.normalization.RMSNorm", "diffusers.models.normalization.RMSNorm")
"""Norms across all heads that can be cut."""


@dataclass(frozen=True)
class ParallelBlock:
    """A block that runs attention and feed-forward side by side: out(cat([attention, act(into)])).

    `width` is the attribute with the channels of the feed-forward; `into` has that many (so without the attribute) or,
    gated, twice as many. classes: those known to have attention first; shapes alone do not tell.
    """

    attention: str
    into: str
    out: str
    width: str
    classes: tuple[str, ...]


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

GATHERED = (
    r"(^|\.)norm\w*\.linear$",
    r"(^|\.)adaLN_modulation(\.\d+)?$",
    r"(^|\.)(img|txt)_mod\.\d+$",
    r"(^|\.)\w*modulation\w*\.(linear|lin)$",
    r"(^|\.)time_proj$",
    r"(^|\.)lm_head$",
)
"""Linears with wide, short outputs (modulation, logits): cut by columns, outputs gathered. Right for any linear; the
list only says where it pays."""

VOCABULARY = 1024
"""Embeddings with at least so many rows are cut by rows."""
